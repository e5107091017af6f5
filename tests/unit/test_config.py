"""Recipe file < environment < command line; and what is refused, with what words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hvd_eurosat.cluster.environment import omp_threads
from hvd_eurosat.config import verbs
from hvd_eurosat.config.reading import load
from hvd_eurosat.config.schema import Config
from hvd_eurosat.errors import UserError
from hvd_eurosat.export import export


def test_defaults() -> None:
    config = load([])
    assert str(config.data.root) == "data"
    assert config.model.weights == "imagenet"
    assert config.run.path == Path("runs/default")


def test_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[train]\nepochs = 5\nbatch_size = 6\nseed = 7\n")
    monkeypatch.setenv("HVD_EUROSAT_TRAIN__BATCH_SIZE", "8")
    monkeypatch.setenv("HVD_EUROSAT_TRAIN__SEED", "9")
    config = load(["--config", str(recipe), "--train.seed", "10"])
    assert (config.train.epochs, config.train.batch_size, config.train.seed) == (5, 8, 10)
    assert config.run.path == Path("runs/mine")


def test_resolved_configuration_is_a_recipe_that_repeats_it(tmp_path: Path) -> None:
    config = load(["--train.epochs", "3", "--data.augment", "false", "--run.dir", str(tmp_path)])
    (tmp_path / "config.toml").write_text(config.to_toml())
    again = load(["--config", str(tmp_path / "config.toml")])
    assert again.flat() == config.flat()


def test_a_configuration_of_before(tmp_path: Path) -> None:
    """It said how gradients add up, as they still do; the other way is gone."""
    path = tmp_path / "config.toml"
    path.write_text(load([]).to_toml().replace("[optim]", '[optim]\nreduction = "sum"'))
    assert load(["--config", str(path), "--run.dir", "runs/default"]).flat() == load([]).flat()
    path.write_text('[optim]\nreduction = "adasum"\n')
    with pytest.raises(UserError, match=r"unknown configuration key optim\.reduction"):
        load(["--config", str(path)])


def test_json_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"optim": {"lr": 0.5}}))
    assert load(["--config", str(tmp_path / "r.json")]).optim.lr == 0.5


def test_help_shows_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{key}" in text for key in Config().flat())
    for python in ("None", "tuple[", "Path", "()"):
        assert python not in text


def test_help_begins_with_what_most_people_need(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load(["--help"])
    usage, _, what, _, *needed = capsys.readouterr().out.splitlines()[:9]
    assert usage == "usage: python -m hvd_eurosat.train [--config FILE] [--KEY VALUE …]"
    assert what.startswith("Train a land-cover classifier")
    flags = [line.split()[0] for line in needed]
    assert flags == ["--config", "--data.root", "--model.weights", "--train.epochs", "--run.dir"]


def test_help_says_what_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verbs.evaluate(["--help"])
    assert capsys.readouterr().out.startswith(
        "usage: python -m hvd_eurosat.evaluate [--config FILE] --checkpoint … [--KEY VALUE …]\n"
    )


@pytest.mark.parametrize(
    "name", ["S\u00fcd.tif", 'a "b", c.tif', "[a].tif", "a\\b.tif", "a\nb.tif", "\udcff.tif", "1", "null"]
)
def test_files_may_have_any_name(name: str) -> None:
    rest = ["--checkpoint", "c", "--out", "o"]
    assert verbs.map_scenes(["--scene", name, "b.tif", *rest, f"--scene={name}"]).scene == tuple(
        map(Path, (name, "b.tif", name))
    )
    assert verbs.predict(["--input", name, "b", *rest]).input == (Path(name), Path("b"))
    for words in ([], ["--scene"]):
        with pytest.raises(UserError, match="--scene is required"):
            verbs.map_scenes([*rest, *words])


def test_a_list_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_EUROSAT_OPTIM__MILESTONES", "[3, 4]")
    assert load([]).optim.milestones == (3, 4)
    monkeypatch.setenv("HVD_EUROSAT_OPTIM__MILESTONES", "3,4")
    with pytest.raises(UserError, match=r"HVD_EUROSAT_OPTIM__MILESTONES: one is a list, which is written \[1, 2, 3\]"):
        load([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.epoch", "3"], "unrecognized arguments: --train.epoch 3: did you mean --train.epochs?"),
        (["--train.batch-size", "3"], "--train.batch-size 3: did you mean --train.batch_size? (--help"),
        (["--train.lr", "3"], "unrecognized arguments: --train.lr 3: did you mean --optim.lr?"),
        (["--nothing"], "unrecognized arguments: --nothing (--help"),
        (["--data", "there"], "unrecognized arguments: --data there (--help"),
        (["--train.epochs", "many"], "train.epochs: Input should be a valid integer"),
        (["--train.batch_size", "-3"], "train.batch_size: Input should be greater than 0, got '-3'"),
        (["--train.epochs"], "--train.epochs: expected one argument"),
        (["--data.augment", "perhaps"], "data.augment: Input should be a valid boolean"),
        (["--model.arch", "vgg"], "model.arch: Input should be 'resnet50' or 'resnet18'"),
        (["--train.start_size", "65"], "train.start_size must be 0 or between 32 and data.image_size (64)"),
        (["--train.start_size", "97", "--data.input_size", "96"], "or between 32 and data.input_size (96)"),
        (["--data.input_size", "31"], "data.input_size: 0 or 32 to 1024 is wanted, got '31'"),
        (["--valid.views", "2"], "valid.views: 1 or 8 is wanted, got '2'"),
        (["--train.mixup", "-1"], "train.mixup: 0 or 0.01 to 10 is wanted, got '-1'"),
        (["--train.cutmix", "nan"], "train.cutmix: 0 or 0.01 to 10 is wanted, got 'nan'"),
        (["--data.random_gain", "1"], "data.random_gain: Input should be less than 1, got '1'"),
        (["--data.random_contrast", "1"], "data.random_contrast: Input should be less than 1, got '1'"),
        (["--data.random_brightness", "1"], "data.random_brightness: Input should be less than 1, got '1'"),
        (["--data.random_erase", "2"], "data.random_erase: Input should be less than or equal to 1, got '2'"),
        (["--train.ema", "1"], "train.ema: Input should be less than 1, got '1'"),
        (["--data.image_size", "31"], "data.image_size: 0 or 32 to 1024 is wanted, got '31'"),
        (["--optim.warmup_epochs", "99"], "optim.warmup_epochs must be below train.epochs (15)"),
        (
            ["--optim.warmup_epochs", "9", "--optim.schedule_epochs", "9"],
            "optim.warmup_epochs must be below optim.schedule_epochs (9)",
        ),
        (["--optim.unfreeze_epochs", "3"], "optim.unfreeze_epochs must be below a fifth of train.epochs (15)"),
        (["--optim.layer_decay", "0"], "optim.layer_decay: Input should be greater than 0, got '0'"),
        (["--optim.milestones", "[1,"], "encountered for optim.milestones: Missing end delimiter"),
        (["--optim.schedule", "multistep"], "optim.schedule multistep wants optim.milestones"),
        (
            ["--optim.schedule", "multistep", "--optim.milestones", "5,9", "--optim.warmup_epochs", "5"],
            "wants optim.milestones, all of them after optim.warmup_epochs",
        ),
        (["--config", "/nowhere.toml"], "--config /nowhere.toml: No such file or directory"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("prepare --source a --out b --image_sise 3", "--image_sise 3: did you mean --image-size?"),
        ("report runs --outt a", "--outt: did you mean --out?"),
        ("doctor --jason", "--jason: did you mean --json?"),
        ("benchmark", "the following arguments are required: what"),
        ("cluster.hosts --host a", "--host a: did you mean --hosts?"),
    ],
)
def test_a_wrong_command_line_is_one_line(words: str, told: str) -> None:
    verb, *rest = words.split()
    command = [sys.executable, "-m", f"hvd_eurosat.{verb}", *rest]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=60)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.endswith(f"{told} (--help lists all)\n")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.toml", "[train]\nepochz = 5\n", "unknown configuration key train.epochz: did you mean train.epochs?"),
        ("r.toml", "[trane]\nepochs = 5\n", "unknown configuration key trane: did you mean train?"),
        ("r.toml", "epochs =", "--config"),
        ("r.json", "[1]", "expected sections data, model, optim, train, valid, run"),
        ("r.yaml", "train: {}", "a recipe is a .toml or a .json file"),
    ],
)
def test_bad_recipes(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        load(["--config", str(tmp_path / name)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("variable", "message"),
    [("HVD_EUROSAT_TRAIN__EPOCHZ", "train.epochz"), ("HVD_EUROSAT_TRANE__EPOCHS", "HVD_EUROSAT_TRANE__EPOCHS")],
)
def test_bad_environment(monkeypatch: pytest.MonkeyPatch, variable: str, message: str) -> None:
    monkeypatch.setenv(variable, "3")
    with pytest.raises(UserError) as error:
        load([])
    assert message in str(error.value)


def test_another_verb_passes_over_a_key_of_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_EUROSAT_DATA__AUGMENT", "false")
    monkeypatch.setenv("HVD_EUROSAT_DATA__ROOT", "there")
    assert verbs.evaluate(["--checkpoint", "c.pt"]).data.root == Path("there")
    with pytest.raises(UserError, match=r"unrecognized arguments: --data\.augment false \(--help"):
        verbs.evaluate(["--checkpoint", "c.pt", "--data.augment", "false"])


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[2].glob("recipes/*.toml")), ids=lambda p: p.stem)
def test_our_recipes_load(recipe: Path) -> None:
    assert load(["--config", str(recipe)]).run.path == Path("runs") / recipe.stem


def test_an_export_states_a_size_of_images() -> None:
    settings = verbs.export(["--format", "torch", "--model.weights", "none", "--data.image_size", "0", "--out", "out"])
    with pytest.raises(UserError, match=r"data\.image_size 0, the images' own, is for train: give the size"):
        export(settings)


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, threads in (("", None), ("4", 4), ("2,1", 2)):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert omp_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(UserError, match="OMP_NUM_THREADS is many"):
        omp_threads()
