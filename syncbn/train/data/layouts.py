"""Where known data sets of images and masks have their files, and what their pixels mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from syncbn.errors import ConfigError
from syncbn.train.data.checks import IGNORED
from syncbn.train.data.files import EXTENSIONS, files_below, in_threads, listed, read_file
from syncbn.train.data.masks import read_mask

Colors = tuple[tuple[int, int, int], ...]
Files = list[tuple[str, str]]

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)
# Name, the number in the files, and color: Cordts et al., "The Cityscapes Dataset …" (2016).
_CITYSCAPES = (
    ("road", 7, (128, 64, 128)),
    ("sidewalk", 8, (244, 35, 232)),
    ("building", 11, (70, 70, 70)),
    ("wall", 12, (102, 102, 156)),
    ("fence", 13, (190, 153, 153)),
    ("pole", 17, (153, 153, 153)),
    ("traffic light", 19, (250, 170, 30)),
    ("traffic sign", 20, (220, 220, 0)),
    ("vegetation", 21, (107, 142, 35)),
    ("terrain", 22, (152, 251, 152)),
    ("sky", 23, (70, 130, 180)),
    ("person", 24, (220, 20, 60)),
    ("rider", 25, (255, 0, 0)),
    ("car", 26, (0, 0, 142)),
    ("truck", 27, (0, 0, 70)),
    ("bus", 28, (0, 60, 100)),
    ("train", 31, (0, 80, 100)),
    ("motorcycle", 32, (0, 0, 230)),
    ("bicycle", 33, (119, 11, 32)),
)
_PETS = ("pet", "background", "outline")


@dataclass(frozen=True)
class Layout:
    """The files of a data set of images and masks.

    Attributes:
        splits: the paths of images and masks, for "train", and for "validation" and "test" if
            there are any.
        classes: their names.
        palette: a color for each.
        values: for each of the 256 values in a mask's file the number of its class, 255 for a
            pixel that counts for nothing, −1 for a value that must not be there.
    """

    splits: dict[str, Files]
    classes: tuple[str, ...]
    palette: Colors
    values: tuple[int, ...]


def masks_layout(path: Path, moves: Callable[[], None]) -> Layout:
    """Return path/train/images/* with path/train/masks/*.png, and likewise of val and test.

    The classes' names are the lines of path/classes.txt. Without it, they are the numbers up to the
    highest one in the training masks, all of which are read.

    Args:
        path: data.path.
        moves: is called with every mask that is read.

    Raises:
        ConfigError: there are no such files, or a mask is missing.
    """
    splits: dict[str, Files] = {}
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        if split == "train" or (path / split).is_dir():
            splits[name] = _paired(path, split)
    if (path / "classes.txt").is_file():
        lines = _lines(path / "classes.txt", "")
        classes = tuple(line.strip() for line in lines if line.strip())
    else:
        classes = _numbers([mask for _, mask in splits["train"]], path, moves)
    return Layout(splits, classes, voc_palette(len(classes)), _table(range(len(classes))))


def voc_layout(path: Path) -> Layout:
    """Return VOC 2012's training images and, for validation, those of its val.txt.

    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective" (2015).

    Raises:
        ConfigError: a file is missing.
    """
    how = (
        "get https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar, unpack "
        "it, and give the directory VOCdevkit/VOC2012"
    )
    root = _root(path, "ImageSets/Segmentation/train.txt", ("VOCdevkit/VOC2012", "VOC2012"), how)
    splits: dict[str, Files] = {}
    for name, split in (("train", "train"), ("validation", "val")):
        names = _lines(root / "ImageSets" / "Segmentation" / f"{split}.txt", how)
        splits[name] = [
            (
                str(root / "JPEGImages" / f"{each}.jpg"),
                str(root / "SegmentationClass" / f"{each}.png"),
            )
            for each in (line.strip() for line in names)
            if each
        ]
    return Layout(splits, VOC_CLASSES, voc_palette(21), _table(range(21)))


def cityscapes_layout(path: Path) -> Layout:
    """Return Cityscapes' training images and, for validation, those of val, with 19 classes.

    Those of test are left out, since their masks are not published.

    Raises:
        ConfigError: a file is missing.
    """
    how = (
        "get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of "
        "https://www.cityscapes-dataset.com/downloads/, unpack both into one directory, and give it"
    )
    splits: dict[str, Files] = {}
    for name, split in (("train", "train"), ("validation", "val")):
        images = files_below(path / "leftImg8bit" / split, ("_leftimg8bit.png",))
        if not images:
            raise ConfigError(f"data.path={path}: there is no image in leftImg8bit/{split}; {how}")
        pairs = splits[name] = []
        for image in map(Path, images):
            stem = image.name.removesuffix("_leftImg8bit.png")
            below = path / "gtFine" / split / image.parent.name / f"{stem}_gtFine_labelIds.png"
            if not below.is_file():
                raise ConfigError(f"data.path={path}: there is no {below.relative_to(path)}; {how}")
            pairs.append((str(image), str(below)))
    values = [IGNORED if value < 34 else -1 for value in range(256)]
    values[255] = IGNORED  # −1, the license plate, in 8 bits
    for number, (_, value, _) in enumerate(_CITYSCAPES):
        values[value] = number
    classes = tuple(name for name, _, _ in _CITYSCAPES)
    return Layout(splits, classes, tuple(color for _, _, color in _CITYSCAPES), tuple(values))


def pets_layout(path: Path) -> Layout:
    """Return Oxford-IIIT Pet's images with their trimaps, for training and test.

    Source: Parkhi, Vedaldi, Zisserman and Jawahar, "Cats and Dogs" (2012).

    Raises:
        ConfigError: a file is missing.
    """
    how = (
        "get images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets/, "
        "unpack both into one directory, and give it"
    )
    root = _root(path, "annotations/trainval.txt", ("oxford-iiit-pet",), how)
    splits: dict[str, Files] = {}
    for name, split in (("train", "trainval"), ("test", "test")):
        names = _lines(root / "annotations" / f"{split}.txt", how)
        splits[name] = [
            (
                str(root / "images" / f"{line.split()[0]}.jpg"),
                str(root / "annotations" / "trimaps" / f"{line.split()[0]}.png"),
            )
            for line in names
            if line.strip() and not line.startswith("#")
        ]
    values = (-1, 0, 1, 2, *[-1] * 252)
    return Layout(splits, _PETS, ((224, 64, 64), (0, 0, 0), (255, 255, 255)), values)


def voc_palette(count: int) -> Colors:
    """Return the colors of the first classes in VOC's files, by the bits of their numbers."""
    return tuple(
        (_spread(number), _spread(number >> 1), _spread(number >> 2)) for number in range(count)
    )


def _spread(number: int) -> int:
    """Return every third bit of a number, the lowest one as the highest of eight."""
    return sum((number >> 3 * place & 1) << (7 - place) for place in range(8))


def _table(classes: Sequence[int]) -> tuple[int, ...]:
    """Return what the values of a mask's file mean if each is the number of its class."""
    return (*classes, *[-1] * (255 - len(classes)), IGNORED)[:256]


def _paired(path: Path, split: str) -> Files:
    """Return the images and masks of a split that have the same names but for their suffixes."""
    directory = path / split
    images = files_below(directory / "images")
    masks = {
        Path(file).relative_to(directory / "masks").with_suffix(""): file
        for file in files_below(directory / "masks", (".png",))
    }
    if not images:
        raise ConfigError(
            f"data.path={path}: there is no image in {directory / 'images'}; there must be "
            f"{path}/train/images/NAME.jpg (or {', '.join(EXTENSIONS[1:])}) with "
            f"{path}/train/masks/NAME.png, whose pixels are the numbers of classes, and likewise "
            "of val, test or both"
        )
    names = [Path(file).relative_to(directory / "images").with_suffix("") for file in images]
    lacking = [str(name) for name in names if name not in masks]
    surplus = sorted(str(name) for name in set(masks) - set(names))
    if lacking or surplus:
        what, where, which = ("mask", "masks", lacking) if lacking else ("image", "images", surplus)
        raise ConfigError(
            f"data.path={path}: there is no {what} in {directory / where} for {listed(which)}; "
            "images and masks belong together by their names"
        )
    if len(set(names)) < len(names):
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        raise ConfigError(
            f"data.path={path}: {directory / 'images'} has several images for {listed(twice)}, "
            "with other suffixes; keep one each"
        )
    return [(image, masks[name]) for image, name in zip(images, names, strict=True)]


def _numbers(masks: list[str], path: Path, moves: Callable[[], None]) -> tuple[str, ...]:
    """Return the numbers up to the highest one in masks, as names of classes."""

    def highest(file: str) -> int:
        values = read_file(file, read_mask)
        moves()
        return int(values[values != IGNORED].max(initial=0))

    most = max(in_threads(highest, masks))
    if most == 0:
        raise ConfigError(
            f"data.path={path}: the training masks hold 0 and {IGNORED} alone, and {IGNORED} marks "
            "pixels that count for nothing; number the classes 0, 1, 2, …"
        )
    return tuple(str(number) for number in range(most + 1))


def _root(path: Path, file: str, below: Sequence[str], how: str) -> Path:
    """Return the directory of a data set, which may lie below the path."""
    for root in (path, *(path / each for each in below)):
        if (root / file).is_file():
            return root
    raise ConfigError(f"data.path={path}: there is no {file}; {how}")


def _lines(file: Path, how: str) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot read {file}: {error}; {how or 'it must have the name of one class a line'}"
        ) from error
