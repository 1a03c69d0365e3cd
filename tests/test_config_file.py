"""Config files, overrides on the command line, and config records."""

import contextlib
import dataclasses
import json
import re

import jax
import pytest
from conftest import tiny_model, tiny_run
from etils import epath

from stackjax.analysis.record import Record
from stackjax.config import BatchStep, Config, Stage
from stackjax.config_file import (
    changed_fields,
    check_same_data,
    flatten,
    load_config,
    record_config,
)
from stackjax.data.manifest import Manifest, Split
from stackjax.growth import LayerMap, Stack
from stackjax.model.config import CompleteP, RopeScaling
from stackjax.model.layer_kind import LayerKind
from stackjax.optimizers import Muon
from stackjax.runtime.errors import UserError
from stackjax.sharding.config import MeshConfig
from stackjax.tokenizer.tokenizer_info import TokenizerInfo
from stackjax.training.preflight import check
from stackjax.training.stages import stage_models

FILE = """
from conftest import tiny_run

def get_config():
    return tiny_run()
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def load(path):
    return lambda *args: load_config("train", ["--config", str(path), *args])


def test_command_line_without_overrides_gives_the_file_config(load):
    assert load() == tiny_run()


def test_config_file_may_import_a_neighbor(path, load):
    other = path.with_name("other.py")
    other.write_text("from experiment import get_config\n")
    assert load_config("train", ["--config", str(other)]) == tiny_run()


def value_of(config: Config, field: str):
    for name in field.split("."):
        config = config[int(name)] if isinstance(config, tuple) else getattr(config, name)
    return config


OVERRIDES = [
    ("--stages.1.tokens", "2e6", "stages.1.tokens", 2_000_000),
    ("--stages.1.tokens", "1_280", "stages.1.tokens", 1280),
    ("--model.num-layers", "12", "model.num_layers", 12),
    ("--stages.1.growth.factor", "3", "stages.1.growth.factor", 3),
    ("--optimizer.peak-learning-rate", "2e-4", "optimizer.peak_learning_rate", 2e-4),
    ("--optimizer.schedule.axis", "run", "optimizer.schedule.axis", "run"),
    ("--optimizer.schedule.horizon-tokens", "6e11", "optimizer.schedule.horizon_tokens", 6e11),
    ("--checkpoints.keep-every-tokens", "None", "checkpoints.keep_every_tokens", None),
    ("--mesh.tensor", "2", "mesh.tensor", 2),
    ("--model-is", "source", "model_is", "source"),
    ("--workdir", "elsewhere", "workdir", "elsewhere"),
]


@pytest.mark.parametrize(("flag", "text", "field", "value"), OVERRIDES)
def test_override_changes_only_its_field(load, flag, text, field, value):
    config = load(flag, text)
    assert value_of(config, field) == value
    assert type(value_of(config, field)) is type(value) or value == 6e11
    differing = flatten(config).items() ^ flatten(tiny_run()).items()
    top = field.split(".factor")[0]
    assert {name for name, _ in differing} <= {top}


def test_overridden_growth_factor_keeps_the_target_model(load):
    models = stage_models(load("--stages.1.growth.factor", "3"))
    assert [model.num_layers for model in models] == [2, 6]


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (("--stages.1.tokens", "0.5"), "--stages.1.tokens is '0.5'"),
        (("--model.num-layer", "12"), "--model.num-layers"),
        (("--model.num-layers", "many"), "many"),
        (("--stages.1.tokens", "nan"), "--stages.1.tokens is 'nan'"),
        (("--stages.9.tokens", "5"), "'--stages.9.tokens 5' is not an option"),
        (("--stages." + "9" * 5000 + ".growth", "stack(2)"), "is not an option"),
        (("--seed", "1e400"), "'1e400' is not a whole number"),
        (("--mesh.fsdp", ""), "--mesh.fsdp is ''"),
        (("--mesh.fsdp", "0"), "mesh.fsdp is 0"),
        (("--optimizer.b1", "2"), "optimizer.b1 is 2.0"),
        (("--workdir", ""), "workdir is ''"),
        (("--stages.1.batch-size", "-1"), "stages.1.batch_size is -1"),
        (
            ("--optimizer.schedule.decay-tokens", "5"),
            "optimizer.schedule.decay_tokens is 5, which has no effect while "
            "optimizer.schedule.shape is 'cosine'",
        ),
        (("--model.embed-dim", "0"), "model.embed_dim is 0"),
        (("--stages.1.growth.factor", "0"), "stack.factor is 0"),
        (("--stages.7.tokens", "5"), "--stages.7.tokens"),
    ],
)
def test_invalid_override_is_refused_with_field_and_value(load, args, shown):
    with pytest.raises(UserError) as raised:
        load(*args)
    assert shown in str(raised.value)


def test_help_lists_every_field_with_its_documentation(load, capsys):
    with pytest.raises(SystemExit) as exit_info:
        load("--help")
    assert not exit_info.value.code
    shown = capsys.readouterr().out
    # Optional groups are listed by their fields.
    unset = ("rewarm", "schedule", "mesh", "rope_scaling", "completep", "routing")
    for field in flatten(tiny_run()):
        if field.split(".")[-1] not in unset and field != "optimizer.name":
            assert re.search(rf"--{field.replace('_', '-')}[ ,]", shown), field
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", shown).split())
    for documentation in (
        "Number of transformer layers.",
        "Tokens between checkpoints.",
        "--seed INT >= 0",
        "--optimizer.b1 FLOAT >= 0, < 1",
        "--optimizer.epsilon FLOAT > 0",
        "--stages.0.batch-size INT >= 1",
        "--stages.0.tokens {None}|{INT >= 1}",
        "--mesh.fsdp {-1}|{INT >= 1}",
    ):
        assert documentation in words


BAD_FILES = {
    "no get_config": "x = 1",
    "not a function": "get_config = 1",
    "not a config": "def get_config():\n    return {}",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_file_without_a_config_is_refused(path, load, name):
    path.write_text(BAD_FILES[name])
    with pytest.raises(ValueError, match=r"experiment.py: the file must define get_config\(\)"):
        load()


BROKEN_FILES = {
    "from stackjax.config import Config\n\ndef get_config():\n    return Config(modle=1)": (
        r"experiment.py, line 4: TypeError: .*unexpected keyword argument 'modle'"
    ),
    "import nowhere": r"experiment.py, line 1: ModuleNotFoundError: No module named 'nowhere'",
    "import sys\nsys.exit(0)": r"experiment.py, line 2: SystemExit: 0",
    "def get_config():\n    return get_config()": r"experiment.py, line 2: RecursionError: ",
    "def get_config(size):\n    return size": r"TypeError: .* required positional argument: 's",
    "class Odd(Exception):\n    __str__ = None\n\nraise Odd": r"experiment.py, line 4: Odd: <",
    "def get_config(:": r"experiment.py: SyntaxError: .*experiment.py, line 1",
}


@pytest.mark.parametrize("text", BROKEN_FILES)
def test_failing_file_is_refused_with_line_and_reason(path, load, text):
    path.write_text(text)
    with pytest.raises(ValueError, match=BROKEN_FILES[text]):
        load()


def test_missing_or_non_python_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.py: there is no such file"):
        load_config("train", ["--config", str(tmp_path / "nothing.py")])
    with pytest.raises(ValueError, match=r"no config given; try `train --config .*--help"):
        load_config("train", ["--model.num-layers", "3"])
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config\.yaml: a config is a Python file"):
        load_config("train", ["--config", str(tmp_path / "config.yaml")])


def test_optimizer_is_replaced_by_name_and_keeps_common_fields(load):
    b1 = ("--optimizer.b1", "0.8")
    muon = load(*b1, "--optimizer", "muon", "--optimizer.momentum", "0.9").optimizer
    assert muon == Muon(**vars(load(*b1).optimizer), momentum=0.9)
    assert load(*b1, "--optimizer=adamw") == load(*b1)
    with pytest.raises(UserError, match=r"optimizer is 'sgd'.*adamw.*muon"):
        load("--optimizer", "sgd")


OWN_OPTIMIZER = """
import dataclasses
import optax
from conftest import tiny_run
from stackjax.optimizers import Optimizer

@dataclasses.dataclass(frozen=True, kw_only=True)
class Sign(Optimizer):
    b1: float = 0.9

    def build(self, axes):
        return optax.scale_by_lion(b1=self.b1)

def get_config():
    return tiny_run(optimizer=Sign(peak_learning_rate=1e-3))
"""


def test_config_file_may_define_an_optimizer(path, load):
    path.write_text(OWN_OPTIMIZER)
    config = load("--optimizer.b1", "0.5")
    flat = flatten(config)
    assert (flat["optimizer.name"], flat["optimizer.b1"]) == ("sign", 0.5)
    estimate, _ = check(config, 1)
    params = sum(leaf.size for leaf in jax.tree.leaves(estimate.state.params))
    assert estimate.state_bytes == 4 * (2 * params + 2)


def test_flat_names_match_the_command_line_and_round_trip_through_json():
    flat = flatten(tiny_run())
    assert flat["stages.1.tokens"] == 1280
    assert flat["stages.1.growth"] == "stack(2)"
    assert flat["optimizer.schedule.shape"] == "cosine"
    assert flat["stages.0.mesh"] is None
    assert json.loads(json.dumps(flat)) == flat


def replace(config, field, value):
    """Returns the config with another value at a dotted field."""
    name, _, rest = field.partition(".")
    if isinstance(config, tuple):
        i = int(name)
        return (*config[:i], replace(config[i], rest, value), *config[i + 1 :])
    inner = replace(getattr(config, name), rest, value) if rest else value
    return dataclasses.replace(config, **{name: inner})


MANIFEST = Manifest(
    tokenizer=TokenizerInfo(name="bytes", digest="original", vocab_size=256, end_id=0),
    dtype="uint16",
    splits={"train": Split(tokens=7, documents=1, shards=())},
)


@pytest.fixture
def recorded(tmp_path):
    workdir = epath.Path(tmp_path)
    record_config(workdir, tiny_run(), [MANIFEST])
    return workdir


def write_record(workdir, fields):
    """Replaces the recorded config; the record has no hash."""
    record = json.loads((workdir / "config.json").read_text()) | {"config": fields}
    record.pop("sha256", None)
    (workdir / "config.json").write_text(json.dumps(record))


def test_older_record_of_adamw_with_a_momentum_is_the_same_config(recorded):
    write_record(recorded, flatten(tiny_run()) | {"optimizer.momentum": 0.95})
    assert changed_fields(recorded, tiny_run(), stage=0) == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [("model.qk_norm", True), ("data.mask_documents", True), ("stages.0.train_layers", "12")],
)
def test_field_missing_from_the_record_has_the_default(recorded, field, value):
    fields = flatten(tiny_run())
    default = fields.pop(field)
    write_record(recorded, fields)
    assert changed_fields(recorded, tiny_run(), 0) == {}
    with pytest.raises(UserError, match=rf"{re.escape(field)}: {default} -> {value}"):
        changed_fields(recorded, replace(tiny_run(), field, value), 0)


def test_nested_config_missing_from_the_record_is_a_change(recorded):
    config = replace(tiny_run(), "model.rope_scaling", RopeScaling())
    with pytest.raises(UserError, match=r"model\.rope_scaling\.factor: None -> 8\.0"):
        changed_fields(recorded, config, 0)


def test_record_without_completep_is_of_a_standard_model(recorded):
    fields = flatten(tiny_run())
    del fields["model.completep"]
    write_record(recorded, fields)
    assert changed_fields(recorded, tiny_run(), 0) == {}
    scaled = CompleteP.of(tiny_run().model)
    with pytest.raises(UserError, match=r"model\.completep\.base_layers: None -> 6"):
        changed_fields(recorded, replace(tiny_run(), "model.completep", scaled), 0)


MAY_CHANGE = [
    ("workdir", "elsewhere"),
    ("mesh", MeshConfig(tensor=2)),
    ("stages.0.mesh", MeshConfig(tensor=2)),
    ("stages.0.accumulate", 2),
    ("stages.0.remat", "full"),
    ("stages.0.loss_chunk", 4),
    ("evaluation.every_tokens", 5),
    ("evaluation.layers", True),
    ("checkpoints.keep_last", 5),
    ("logging.tensorboard", False),
    ("data.num_workers", 2),
    ("data.path", "moved"),
    ("model.remat", "full"),
    ("model.scan_unroll", 3),
    ("model.attention", "xla"),
    ("platform", "accelerator"),
    ("model.loss_chunk", 4),
    # These change training from the resumed step on.
    ("optimizer.peak_learning_rate", 1.0),
    ("optimizer.schedule.final_fraction", 0.0),
    ("optimizer.clip_norm", 0.5),
    ("optimizer.weight_decay", 0.0),
    ("stages.0.tokens", 1280),
    ("stages.0.batch_size", 16),
    ("stages.0.peak_learning_rate", 0.5),
    ("checkpoints.every_tokens", 64),
]

MAY_NOT_CHANGE = [
    ("model.num_layers", 12, "the parameters in the checkpoints"),
    ("model.rope_theta", 5e5, "the parameters in the checkpoints"),
    ("model.compute_dtype", "bfloat16", "the parameters in the checkpoints"),
    ("model_is", "source", "the parameters in the checkpoints"),
    ("optimizer.moments_dtype", "bfloat16", "the optimizer state in the checkpoints"),
    ("optimizer.b2", 0.9, "the moments in the checkpoints"),
    ("data.seq_len", 16, "the order of the data"),
    ("data.mask_documents", True, "would not compare"),
    ("evaluation.num_sequences", 16, "one curve has one set of held-out sequences"),
    ("stages.0.train_layers", "12", "already trained"),
    ("init_from", "elsewhere", "the run began with these parameters"),
    ("seed", 1, "the order of the data follow from it"),
]


@pytest.mark.parametrize(("field", "value"), MAY_CHANGE)
def test_permitted_change_is_reported(recorded, field, value):
    lines = changed_fields(recorded, replace(tiny_run(), field, value), 0)
    assert lines
    assert all(line.startswith(field) for line in lines.values())


@pytest.mark.parametrize(("field", "value", "why"), MAY_NOT_CHANGE)
def test_other_change_is_refused_with_the_reason(recorded, field, value, why):
    was = flatten(tiny_run())[field]
    config = replace(tiny_run(), field, value)
    message = rf"{re.escape(field)}: {was} -> {value} \(.*{why}.*start a new run with --workdir"
    with pytest.raises(UserError, match=message):
        changed_fields(recorded, config, 0)


def test_every_changed_field_is_reported_or_refused_with_a_reason(recorded):
    for field in flatten(tiny_run()):
        write_record(recorded, flatten(tiny_run()) | {field: "another"})
        try:
            assert changed_fields(recorded, tiny_run(), 0)
        except UserError as error:
            assert re.search(rf"{re.escape(field)}: .* \(\w+ .*\)\.", str(error)), field


@pytest.mark.parametrize(
    ("field", "value"), [("tokens", 4096), ("batch_size", 4096), ("peak_learning_rate", 0.5)]
)
def test_finished_stages_may_not_change(recorded, field, value):
    config = replace(tiny_run(), f"stages.0.{field}", value)
    assert changed_fields(recorded, config, 0)
    with pytest.raises(UserError, match=r"already trained"):
        changed_fields(recorded, config, 1)


def test_future_stages_may_change(recorded):
    config = replace(tiny_run(), "stages.1.growth", LayerMap((0, 1, 2, 2, 1, 0)))
    (line,) = changed_fields(recorded, config, 0).values()
    assert line == "stages.1.growth: stack(2) -> layer_map([0,1,2,2,1,0])"
    with pytest.raises(ValueError, match=r"may not change .* stages\.1\.growth"):
        changed_fields(recorded, config, 1)


def test_early_stopping_may_change_until_its_stage_ends(recorded):
    until = dataclasses.replace(tiny_run().stages[1].until, loss=2.0)
    first, second = (replace(tiny_run(), f"stages.{i}.until", until) for i in (0, 1))
    for stage in (0, 1):
        assert changed_fields(recorded, second, stage) == {
            "stages.1.until.loss": "stages.1.until.loss: None -> 2.0"
        }
    assert changed_fields(recorded, first, 0) == {
        "stages.0.until.loss": "stages.0.until.loss: None -> 2.0"
    }
    with pytest.raises(ValueError, match=r"may not change .* stages\.0\.until\.loss"):
        changed_fields(recorded, first, 1)


def test_stage_may_be_appended(recorded):
    more = Stage(tokens=64, batch_size=8, growth=Stack(factor=2))
    config = dataclasses.replace(tiny_run(), stages=(*tiny_run().stages, more))
    assert changed_fields(recorded, config, 1)["stages.2.tokens"].endswith(": None -> 64")


def test_unchanged_config_reports_nothing(recorded):
    assert changed_fields(recorded, tiny_run(), 1) == {}


OTHER_DATA = [
    ("tokenizer", dataclasses.replace(MANIFEST.tokenizer, digest="another")),
    ("dtype", "uint32"),
    ("splits", {"train": Split(tokens=8, documents=1, shards=())}),
]


@pytest.mark.parametrize(("field", "value"), OTHER_DATA)
def test_other_data_are_refused_and_moved_data_are_accepted(recorded, field, value):
    moved = dataclasses.replace(MANIFEST.tokenizer, name="moved/tokenizer.json")
    check_same_data(recorded, [dataclasses.replace(MANIFEST, tokenizer=moved)])
    with pytest.raises(ValueError, match=r"other token shards.*--workdir"):
        check_same_data(recorded, [dataclasses.replace(MANIFEST, **{field: value})])


RAISED = {
    "def get_config():\n    raise Ended": "line 5: Ended",
    "raise SystemExit(0)": "line 4: SystemExit: 0",
    "raise GeneratorExit": "line 4: GeneratorExit",
    "def get_config():\n    return {}['size']": "line 5: KeyError: 'size'",
}


@pytest.mark.parametrize("body", RAISED)
def test_any_exception_of_a_config_file_is_one_line(path, load, body):
    path.write_text(f"class Ended(BaseException):\n    pass\n\n{body}")
    with pytest.raises(UserError, match=rf"experiment\.py, {RAISED[body]}"):
        load()


def stepped(*steps, **fields):
    """The tiny run, with another batch from a number of tokens on."""
    batches = tuple(BatchStep(from_tokens=start, batch_size=size) for start, size in steps)
    first, *later = tiny_run().stages
    first = dataclasses.replace(first, batch_steps=batches, **fields)
    return dataclasses.replace(tiny_run(), stages=(first, *later))


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (stepped((64, 16), (96, 16)), (0, 1, 2)),  # no change
        (stepped((64, 16), (96, 32)), (0, 1, 2)),
        (stepped((64, 16), (112, 32)), (0, 1)),
        (stepped((64, 16)), (0, 1)),
        (stepped((64, 16), (96, 16), (112, 32)), (0, 1, 2)),
        (stepped((64, 32), (96, 16)), (0, 1)),
        (stepped((80, 16), (96, 16)), (0,)),
        (stepped((64, 16), (96, 16), batch_size=4), (0,)),
        (stepped((64, 16), (96, 16), accumulate=2), (0, 1, 2)),
    ],
)
def test_only_batches_to_come_may_change(recorded, config, parts):
    write_record(recorded, flatten(stepped((64, 16), (96, 16))))
    for part in (0, 1, 2):
        refused = pytest.raises(UserError, match="already trained")
        with contextlib.nullcontext() if part in parts else refused:
            changed_fields(recorded, config, 0, part)


def test_recorded_layer_kinds_are_read_back(tmp_path):
    model = tiny_model(
        num_layers=6, pattern=(LayerKind(window=3, rope_theta=50.0), LayerKind())
    )
    config = tiny_run(tmp_path, model=model)
    fields = json.loads(json.dumps(flatten(config)))
    record = Record(path=epath.Path(tmp_path), config=fields, data={}, rows=[])
    assert record.final_model.pattern == model.pattern
    del_kinds = {name: v for name, v in fields.items() if "rope_theta" not in name}
    older = dataclasses.replace(record, config=del_kinds)
    assert older.final_model.pattern[0] == LayerKind(window=3)
