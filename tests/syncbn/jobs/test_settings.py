import dataclasses
import re
from pathlib import Path

import pytest

from syncbn.errors import JobSettingsError, SubmissionError
from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.offer.settings import JobSettings, Limits, Retention, Slots


def _read(directory: Path, text: str) -> Catalog:
    (directory / "settings.toml").write_text(text)
    return Catalog(JobSettings.read(directory))


def test_without_a_file_everything_is_as_by_default(tmp_path: Path) -> None:
    settings = JobSettings.read(tmp_path)
    assert settings.limits == Limits()
    assert settings.data == {}
    assert settings.file == tmp_path / "settings.toml"


def test_named_data_and_models_are_choices_with_the_rest_of_their_keys(
    administered: Catalog,
) -> None:
    groups = administered.options()["groups"]
    flowers = groups["data"]["choices"]["flowers"]
    assert flowers["help"] == "17 kinds of flowers"
    keys = {key["key"]: key for key in flowers["values"]}
    assert keys["data.size"]["default"] == 64
    assert keys["data.batch_size"]["default"] == 32
    assert "data.path" not in keys
    assert groups["model"]["choices"]["large"] == {"help": "the usual one", "values": []}


def test_relative_paths_are_below_the_directory_of_the_file(administered: Catalog) -> None:
    (spec,) = administered.check({"choices": {"data": "flowers"}})
    config = administered.configuration(spec, run_dir=Path("/x"))
    root = administered.settings.file.parent
    assert getattr(config.data, "path", None) == str(root / "images/flowers")


def test_defaults_are_for_whoever_says_nothing(administered: Catalog) -> None:
    (spec,) = administered.check({})
    config = administered.configuration(spec, run_dir=Path("/x"))
    assert (config.epochs, config.optim.lr, config.norm.name) == (3, 0.02, "local")
    assert config.launch.timeout_s == 600
    (spec,) = administered.check({"choices": {"norm": "sync"}, "values": {"epochs": 5}})
    config = administered.configuration(spec, run_dir=Path("/x"))
    assert (config.epochs, config.norm.name) == (5, "sync")
    options = administered.options()
    assert options["groups"]["norm"]["default"] == "local"
    assert next(key for key in options["values"] if key["key"] == "epochs")["default"] == 3


def test_limits_bound_what_is_accepted(tmp_path: Path) -> None:
    catalog = _read(
        tmp_path,
        "[limits]\nnproc = 4\nepochs = 20\nsweep_jobs = 2\ncores = 8\nloaders = 4\n"
        "memory_bytes = 2_000_000_000\n[retention]\ndays = 30\n[slots]\naging_s = 10\n",
    )
    assert catalog.settings.retention.days == 30
    assert catalog.settings.slots.aging_s == 10
    assert catalog.options()["limits"]["sweep_jobs"] == 2
    for submission, reason in (
        ({"values": {"launch.nproc": 5}}, r"^launch\.nproc=5: must be an integer from 1 to 4$"),
        ({"values": {"epochs": 21}}, r"^epochs=21: must be an integer from 1 to 20$"),
        ({"cores": 9}, r"^cores=9: must be an integer from 1 to 8, or null$"),
        ({"sweep": {"seed": [1, 2, 3]}}, r"must make at most 2 \(limits\.sweep_jobs"),
        ({"values": {"data.workers": 3}}, r"^data\.workers=3: must be at most 2 for launch"),
        ({"choices": {"model": "torchvision"}}, r"may take 3482 MB of memory, and must be at"),
    ):
        with pytest.raises(SubmissionError, match=reason):
            catalog.check(submission)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("limits = 1", "limits=1: must be a table, as [limits]"),
        ("[limitz]", "unknown key limitz=(an object); did you mean limits? valid: data, models"),
        ("[limits]\nnprok = 1", "unknown key limits.nprok=1; did you mean nproc? valid: limits."),
        ("[limits]\nnproc = 0", "limits.nproc=0: must be greater than 0"),
        ("[limits]\nnproc = true", "limits.nproc=true: must be a valid integer"),
        ("[limits]\nnproc = '4'", "limits.nproc=4: must be a valid integer"),
        ("[slots]\naging_s = nan", "slots.aging_s=nan: must be"),
        ("[retention]\ndays = -1", "retention.days=-1: must be greater than 0"),
        ("[data.x]\npath = '/x'", "data.x.kind=null: must be one of cifar10, mnist"),
        ("[data.x]\nkind = 'folders'", "data.x.kind=folders: did you mean folder? must be one of"),
        ("[data.x]\nkind = 'digits'", "data.x.kind=digits: must be one of cifar10"),
        ("[data]\nx = 1", "data.x=1: must be a table, as [data.x]"),
        ("[data.x]\nkind = 'folder'", "data.x: kind=folder needs path"),
        ("[data.x]\nkind = 'folder'\npath = 1", "data.x.path=1: must be a path"),
        ("[data.x]\nkind = 'folder'\npath = '/x'\nhelp = 2", "data.x.help=2: must be one line"),
        (
            "[data.x]\nkind = 'folder'\npath = '/x'\nsise = 2",
            "unknown key data.x.sise=2; did you mean size? valid: kind, help, batch_size",
        ),
        (
            "[data.x]\nkind = 'folder'\npath = '/x'\nsize = -2",
            "data.x: data.size=-2: must be an integer from 1 to 2048",
        ),
        (
            "[data.x]\nkind = 'folder'\npath = '/x'\nsize = '64'",
            "data.x: data.size=64: must be an integer from 1 to 2048",
        ),
        (
            "[data.x]\nkind = 'folder'\npath = '/x'\nsize = 4096",
            "data.x: data.size=4096: must be an integer from 1 to 2048",
        ),
        ("[data.x]\nkind = 'custom'\nfactory = 'x'", "data.x: data.factory=x: string should match"),
        ("[data.x]\nkind = 'custom'", "data.x: kind=custom needs factory"),
        ("[data.x]\nkind = 'folder'\npath = '${oc.env:HOME}'", "data.x: a value would be read as"),
        (
            "[data.digits]\nkind = 'folder'\npath = '/x'",
            "data.digits: digits is offered as it is; choose another name",
        ),
        ("[data.'a b']\nkind = 'folder'", "data.a b: a name has small letters"),
        ("[data.X]\nkind = 'folder'", "data.X: a name has small letters"),
        (
            "[models.x]\nkind = 'torchvision'\narchitecture = 'resnet19'",
            "models.x: model.architecture=resnet19: did you mean resnet18",
        ),
        ("[models.x]\nkind = 'timm'\narchitecture = 'x'", "models.x: model.architecture=x: timm"),
        ("[defaults]\nepochs = 2", "unknown key defaults.epochs=2; valid: defaults.choices"),
        ("[defaults.choices]\nnorm = 1", "defaults.choices.norm=1: must be the name of a choice"),
        (
            "[defaults.choices]\nnorm = 'synch'",
            "defaults.choices: norm=synch: did you mean sync? must be one of",
        ),
        ("[defaults.choices]\nnrom = 'sync'", "defaults.choices: choices.nrom=sync: unknown group"),
        ("[defaults.values]\nepoch = 2", "defaults.values.epoch: there is no such key"),
        ("[defaults.values]\noptim.lrr = 2", "defaults.values.optim.lrr: there is no such key"),
        ("[defaults.values]\nepochs = 0", "epochs=0: input should be greater than 0"),
        (
            "[defaults.values]\nepochs = 100_000",
            "the default epochs=100000: must be an integer from 1 to 10000; set another in",
        ),
        ("[limits]\nnproc = 1", "the default launch.nproc=2: must be an integer from 1 to 1; set"),
        (
            "[defaults.values]\nrun_dir = '/x'",
            "defaults.values.run_dir=/x: cannot be set; the server chooses where a job lies",
        ),
        (
            "[defaults.values]\nlaunch.threads = 1",
            "defaults.values.launch.threads=1: cannot be set; the server divides",
        ),
        ("[defaults.values]\nlaunch.timeout_s = 0", "launch.timeout_s=0: input should be greater"),
        ("[defaults.values]\ntask.loss = 'os:system'", "defaults.values.task.loss=os:system: can"),
        ("a = ", "is no TOML: Invalid value"),
        ("a = " + "[" * 100_000, "is no TOML: "),
        ("#" * (1 << 21), "is larger than 1048576 bytes"),
    ],
)
def test_wrong_file_is_refused_with_file_key_and_value(
    text: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(JobSettingsError) as refused:
        _read(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path}/settings.toml: {reason}")


def test_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").mkdir()
    with pytest.raises(JobSettingsError, match=r"settings\.toml: cannot be read: Is a directory"):
        JobSettings.read(tmp_path)
    (tmp_path / "settings.toml").rmdir()
    (tmp_path / "settings.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(JobSettingsError, match=r"settings\.toml: is no TOML"):
        JobSettings.read(tmp_path)


def test_documented_file_is_accepted_and_has_every_key_with_its_default(tmp_path: Path) -> None:
    text = Path("docs/jobs/settings.toml").read_text()
    settings = _read(tmp_path, text).settings
    assert (settings.limits, settings.retention, settings.slots) == (
        Limits(),
        Retention(),
        Slots(),
    )
    for schema in (Limits, Retention, Slots):
        for field in dataclasses.fields(schema):
            assert re.search(rf"^(# )?{field.name} = ", text, re.MULTILINE), field.name
