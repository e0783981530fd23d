"""What the administrator decides, in the file settings.toml of the directory of jobs."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from syncbn.errors import JobSettingsError
from syncbn.jobs.offer.values import close_to, shown

SETTINGS_FILE = "settings.toml"
GIB = 1 << 30

# What may be offered under names of the administrator's. The others need none: they read no files,
# run no code, and have no size that is not bounded.
DATA_KINDS = (
    "cifar10",
    "mnist",
    "fashion_mnist",
    "folder",
    "masks",
    "voc",
    "cityscapes",
    "pets",
    "custom",
)
MODEL_KINDS = ("cnn", "mlp", "unet", "torchvision", "timm", "custom")

_STRICT = ConfigDict(strict=True)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Limits:
    """How much may be asked for: the table [limits].

    Attributes:
        waiting_jobs: of one API key, jobs that have not started.
        running_cores: of one API key, cores of jobs that run; None: all there are.
        disk_bytes: of one API key, what its jobs keep.
        sweep_jobs: of one sweep.
        nproc: replicas of one job.
        cores: of one job.
        epochs: passes over the training data.
        loaders: processes that prepare batches, of all replicas of a job together.
        memory_bytes: what all replicas of a job together may need, roughly estimated.
    """

    waiting_jobs: PositiveInt = 10_000
    running_cores: PositiveInt | None = None
    disk_bytes: PositiveInt = 100 * GIB
    sweep_jobs: Annotated[int, Field(gt=0, le=100_000)] = 1000
    nproc: Annotated[int, Field(gt=0, le=4096)] = 16
    cores: Annotated[int, Field(gt=0, le=65_536)] = 256
    epochs: Annotated[int, Field(gt=0, le=10**9)] = 10_000
    loaders: Annotated[int, Field(ge=0, le=4096)] = 32
    memory_bytes: PositiveInt = 16 * GIB


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Retention:
    """How long jobs that have ended are kept: the table [retention]. What was published stays.

    Attributes:
        days: since a job ended; None: for ever.
        jobs: the newest so many; None: all.
        disk_bytes: of the newest so many bytes; None: all.
    """

    days: PositiveFloat | None = None
    jobs: NonNegativeInt | None = None
    disk_bytes: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Slots:
    """Who is next: the table [slots].

    Attributes:
        aging_s: after so many seconds, a waiting job counts as one level of priority higher.
        patience_s: how long smaller jobs may go before one for which there is no room.
    """

    aging_s: Annotated[float, Field(gt=0, le=10**9)] = 60.0
    patience_s: Annotated[float, Field(ge=0, le=10**9)] = 60.0


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Cluster:
    """How jobs run on a cluster: the table [cluster].

    Attributes:
        python: the interpreter there; None: that of the dispatcher, which all machines see.
        ranks_per_node: a job of more ranks gets several machines; None: none does.
        sbatch: arguments of Slurm's sbatch, such as "--qos=low", after those that are ours.
    """

    python: str | None = None
    ranks_per_node: Annotated[int, Field(gt=0, le=4096)] | None = None
    sbatch: list[str] = Field(default_factory=list[str])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """A data set or a model that the administrator offers under a name.

    Attributes:
        kind: which choice of conf/ it is made of.
        help: what it is, in a sentence.
        values: what differs from that choice's defaults.
    """

    kind: str
    help: str
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSettings:
    """All that the administrator decides; see docs/jobs.md.

    Attributes:
        file: where it was read from, for errors.
        data: data sets by name.
        models: models by name.
        default_choices: what a submission gets of a group if it makes no choice.
        default_values: what it gets of a key if it sets none, of launch too.
        limits: how much may be asked for.
        retention: what is kept.
        slots: who is next.
        cluster: how jobs run there.
    """

    file: Path = Path(SETTINGS_FILE)
    data: Mapping[str, Named] = field(default_factory=dict[str, Named])
    models: Mapping[str, Named] = field(default_factory=dict[str, Named])
    default_choices: Mapping[str, str] = field(default_factory=dict[str, str])
    default_values: Mapping[str, Any] = field(default_factory=dict[str, Any])
    limits: Limits = field(default_factory=Limits)
    retention: Retention = field(default_factory=Retention)
    slots: Slots = field(default_factory=Slots)
    cluster: Cluster = field(default_factory=Cluster)

    @classmethod
    def read(cls, directory: Path) -> "JobSettings":
        """Return what the file settings.toml of a directory says, or the defaults without one.

        Raises:
            JobSettingsError: it cannot be read, or says what nobody knows; the message names the
                file, the key and the value. `Catalog` checks the data sets and models themselves.
        """
        file = directory / SETTINGS_FILE
        try:
            with file.open("rb") as stream:
                content = stream.read(_FILE_BYTES + 1)
            if len(content) > _FILE_BYTES:
                raise JobSettingsError(f"{file}: is larger than {_FILE_BYTES} bytes")
            tables = tomllib.loads(content.decode())
        except FileNotFoundError:
            return cls(file=file)
        except OSError as error:
            raise JobSettingsError(f"{file}: cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
            raise JobSettingsError(f"{file}: is no TOML: {error}") from error
        return _Reader(file).settings(tables)


_Table = TypeVar("_Table", Limits, Retention, Slots, Cluster)


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Makes settings of what a file holds, and names it in errors."""

    file: Path

    def settings(self, tables: Mapping[str, Any]) -> JobSettings:
        known = ("data", "models", "defaults", "limits", "retention", "slots", "cluster")
        self._check_known("", tables, known)
        defaults = self._table(tables, "defaults")
        self._check_known("defaults.", defaults, ("choices", "values"))
        choices = self._table(defaults, "choices", "defaults.")
        for group, name in choices.items():
            if not isinstance(name, str):
                raise self._refusal(f"defaults.choices.{group}", name, "the name of a choice")
        return JobSettings(
            file=self.file,
            data=self._named(tables, "data", DATA_KINDS),
            models=self._named(tables, "models", MODEL_KINDS),
            default_choices=choices,
            default_values=_flat(self._table(defaults, "values", "defaults.")),
            limits=self._typed(tables, "limits", Limits),
            retention=self._typed(tables, "retention", Retention),
            slots=self._typed(tables, "slots", Slots),
            cluster=self._typed(tables, "cluster", Cluster),
        )

    def _named(
        self, tables: Mapping[str, Any], section: str, kinds: tuple[str, ...]
    ) -> dict[str, Named]:
        found: dict[str, Named] = {}
        for name in self._table(tables, section):
            key = f"{section}.{name}"
            if _NAME.fullmatch(name) is None:
                raise JobSettingsError(
                    f"{self.file}: {section}.{shown(name)}: a name has small letters, digits, "
                    "'_' and '-', at most 64, and begins with a letter or digit"
                )
            values = dict(self._table(tables[section], name, f"{section}."))
            kind, text = values.pop("kind", None), values.pop("help", "")
            if kind not in kinds:
                close = close_to(kind, kinds) if isinstance(kind, str) else ""
                raise self._refusal(f"{key}.kind", kind, f"one of {', '.join(kinds)}", close)
            if not isinstance(text, str) or not text.isprintable():
                raise self._refusal(f"{key}.help", text, "one line of text")
            for path in {"path", "weights"} & values.keys():
                if not isinstance(values[path], str):
                    raise self._refusal(f"{key}.{path}", values[path], "a path")
                values[path] = str((self.file.parent / values[path]).absolute())
            found[name] = Named(kind=kind, help=text or f"{kind}, as {name}", values=values)
        return found

    def _typed(self, tables: Mapping[str, Any], section: str, schema: type[_Table]) -> _Table:
        values = self._table(tables, section)
        self._check_known(f"{section}.", values, [each.name for each in dataclasses.fields(schema)])
        try:
            return schema(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = f"{section}.{'.'.join(map(str, first['loc']))}"
            said = first["msg"].removeprefix("Input should be ")
            raise self._refusal(key, first["input"], said) from error

    def _table(self, tables: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise self._refusal(f"{prefix}{name}", table, f"a table, as [{prefix}{name}]")
        return cast(dict[str, Any], table)

    def _check_known(self, prefix: str, table: Mapping[str, Any], known: Any) -> None:
        for key in table:
            if key not in known:
                raise JobSettingsError(
                    f"{self.file}: unknown key {prefix}{shown(key)}={shown(table[key])}; "
                    f"{close_to(key, known)}valid: {', '.join(prefix + each for each in known)}"
                )

    def _refusal(self, key: str, value: object, valid: str, hint: str = "") -> JobSettingsError:
        return JobSettingsError(f"{self.file}: {key}={shown(value)}: {hint}must be {valid}")


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by their keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(cast(dict[str, Any], value), f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
