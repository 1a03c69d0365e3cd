"""Scores in lm-evaluation-harness equal the scores of the `hf` model; output and errors."""

import functools
import json
import os
import re
import sys
import types

import jax
import judge
import lm_eval.tasks
import numpy as np
import pytest
import tokenizers
import transformers
from conftest import mesh_of, random_params, tiny_model
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from stackjax.analysis import evaluation
from stackjax.analysis.published import PUBLISHED_SCORES
from stackjax.analysis.scores import tell
from stackjax.evaluate import main
from stackjax.files.output import check_new_file
from stackjax.inference.lm_eval_adapter import StackjaxLM
from stackjax.inference.pretrained import Pretrained
from stackjax.options import ACCURACY_TASKS, PAPER_TASKS
from stackjax.tokenizer.tokenization import tokenization
from stackjax.tokenizer.tokenizer import load_tokenizer

SEQ_LEN = 40
CONFIG = tiny_model(vocab_size=256, vocab_multiple=128)
NEW_TOKENS = 6
TASKS = ("choices", "rolling", "written")


@functools.cache
def params():
    """Parameters with high entropy, so that word perplexity is finite."""
    values = random_params(CONFIG)
    return values | {"head": values["head"] / 4}


@pytest.fixture(scope="module")
def pretrained() -> Pretrained:
    return Pretrained(
        config=CONFIG,
        params=jax.device_put(params()),
        mesh=mesh_of("one device"),
        tokenization=tokenization(load_tokenizer("bytes")),
        seq_len=SEQ_LEN,
    )


@pytest.fixture(scope="module")
def ours(pretrained) -> StackjaxLM:
    return StackjaxLM(pretrained, batch_size=4)


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a transformers tokenizer equal to the `bytes` tokenizer."""
    printed = bytes_to_unicode()
    merged = tokenizers.models.BPE({printed[byte]: byte for byte in range(256)}, [])
    tokenizer = tokenizers.Tokenizer(merged)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=printed[0], pad_token=printed[0]
    )


@pytest.fixture(scope="module")
def theirs() -> HFLM:
    network = judge.loaded(CONFIG, params())
    network.generation_config.eos_token_id = 0
    return HFLM(
        pretrained=network,
        tokenizer=byte_tokenizer(),
        max_length=SEQ_LEN,
        batch_size=3,
        device="cpu",
    )


def requests_of(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def random_text(rng: np.random.Generator, num_bytes: int) -> str:
    return "".join(rng.choice(list("abc de\u00e9\n"), num_bytes))


@pytest.fixture(scope="module")
def task_dir(theirs, tmp_path_factory):
    """Tasks with every output type; every second generated answer is correct."""
    directory, rng = tmp_path_factory.mktemp("tasks"), np.random.default_rng(0)
    ending = {"until": ["a", "\n"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    # Some prompts are longer than the context.
    prompts = ["x" + random_text(rng, size) for size in rng.integers(1, 2 * SEQ_LEN, 16)]
    written = theirs.generate_until(
        requests_of("generate_until", *((p, ending) for p in prompts))
    )
    choices = [
        {
            "prompt": prompt,
            "options": ["a" + random_text(rng, size) for size in rng.integers(1, 9, 3)],
            "answer": int(rng.integers(3)),
        }
        for prompt in prompts
    ]
    rolling = [{"text": random_text(rng, size)} for size in (1, 39, 40, 41, 80, 81, 200)]
    written = [
        {"prompt": prompt, "answer": text if i % 2 else "nothing"}
        for i, (prompt, text) in enumerate(zip(prompts, written, strict=True))
    ]
    write_task(
        directory,
        "choices",
        choices,
        output_type="multiple_choice",
        doc_to_text="{{prompt}}",
        doc_to_choice="{{options}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    write_task(
        directory,
        "rolling",
        rolling,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    )
    write_task(
        directory,
        "written",
        written,
        output_type="generate_until",
        doc_to_text="{{prompt}}",
        doc_to_target="{{answer}}",
        generation_kwargs=ending,
        metric_list=[{"metric": "exact_match"}],
    )
    group = {"group": "both", "task": ["choices", "rolling"]}
    (directory / "both.yaml").write_text(json.dumps(group))
    return directory


def write_task(directory, name: str, documents: list[dict], **fields) -> None:
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(directory / "cache"),
        },
        "test_split": "test",
        "metadata": {"version": 3},
    }
    # JSON is valid YAML.
    (directory / f"{name}.yaml").write_text(json.dumps(task | fields))


@pytest.fixture(scope="module")
def measured(task_dir, ours, theirs):
    """The harness's results for our model and the hf model."""
    index = lm_eval.tasks.TaskManager(include_path=task_dir, include_defaults=False)
    return [
        simple_evaluate(lm, tasks=list(TASKS), task_manager=index, bootstrap_iters=10)
        for lm in (ours, theirs)
    ]


@pytest.mark.slow
def test_accuracies_and_exact_matches_equal_hf(measured):
    for task, metric in (
        ("choices", "acc"),
        ("choices", "acc_norm"),
        ("written", "exact_match"),
    ):
        actual, reference = (found["results"][task][f"{metric},none"] for found in measured)
        assert actual == reference
        assert 0 < actual < 1, "trivial score"


def test_perplexities_match_hf(measured):
    for metric in ("word_perplexity", "byte_perplexity"):
        actual, reference = (
            found["results"]["rolling"][f"{metric},none"] for found in measured
        )
        assert actual == pytest.approx(reference, rel=1e-4)
        assert np.isfinite(reference) and reference > 2


@pytest.mark.parametrize("task", TASKS)
def test_every_response_matches_hf(measured, task):
    actual, reference = (
        [sample["filtered_resps"] for sample in found["samples"][task]] for found in measured
    )
    flat = [jax.tree.leaves(answers) for answers in (actual, reference)]
    assert len(flat[0]) == len(flat[1]) > 0
    for answer, expected in zip(*flat, strict=True):
        if isinstance(expected, float):
            # A float32 sum over up to 200 tokens; hf sums in float64.
            expected = pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert answer == expected


def test_long_and_empty_contexts_match_hf(ours, theirs):
    text = random_text(np.random.default_rng(1), 3 * SEQ_LEN)
    requests = requests_of(
        "loglikelihood",
        ("", "ab"),
        ("a ", "b"),
        (text, "ab"),
        ("ab", text.encode()[: SEQ_LEN - 1].decode(errors="ignore")),
        ("", "abc"),
    )
    actual, reference = (lm.loglikelihood(requests) for lm in (ours, theirs))
    np.testing.assert_allclose(
        [answer[0] for answer in actual], [answer[0] for answer in reference], rtol=1e-5
    )
    assert [answer[1] for answer in actual] == [answer[1] for answer in reference]


def test_whitespace_context_moves_to_the_continuation(ours):
    space, empty = ours.loglikelihood(requests_of("loglikelihood", (" ", "a"), ("", " a")))
    assert space == empty


def test_generation_uses_the_settings_of_each_request(pretrained, monkeypatch):
    calls = []

    def continuations(_, prompts, sampling, max_tokens, key, until, vocab_size):
        temperature = sampling.temperature
        calls.append((len(prompts), max(map(len, prompts)), max_tokens, temperature))
        texts = [f"{len(prompt)}{until[0]}never read" for prompt in prompts]
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    monkeypatch.setattr("stackjax.inference.lm_eval_adapter.continuations", continuations)
    lm = StackjaxLM(pretrained, batch_size=2)
    greedy = {"until": ".", "max_gen_toks": 30}
    sampled = {"until": ["!"], "max_gen_toks": 5, "do_sample": True, "temperature": 0.7}
    prompts = ["ab", "abcd", "", "a" * 50, "abc"]
    kinds = [greedy, sampled, greedy, greedy, sampled]
    requests = requests_of("generate_until", *zip(prompts, kinds, strict=True))
    assert lm.generate_until(requests) == ["2", "4", "1", "10", "3"]
    assert sorted(calls) == [(1, 1, 30, 0.0), (2, 4, 5, 0.7), (2, 10, 30, 0.0)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"until": ["."]}, "max_gen_toks of a task is 256;.* less than 40"),
        ({"until": ["."], "max_gen_toks": 4, "num_beams": 4}, "has num_beams"),
        ({"max_gen_toks": "x"}, "generation_kwargs of a task are"),
        ({"max_gen_toks": 4, "do_sample": True}, "do_sample without a temperature"),
    ],
)
def test_invalid_generation_kwargs_are_refused(ours, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ours.generate_until(requests_of("generate_until", ("a", kwargs)))


def test_text_longer_than_the_context_is_refused(ours):
    with pytest.raises(ValueError, match=r"has 41 tokens.* 40"):
        ours.loglikelihood(requests_of("loglikelihood", ("a", "b" * 41)))


@pytest.fixture
def only_local_tasks(monkeypatch):
    """Skips the slow index over the harness's thousands of tasks."""
    only = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", only)


@pytest.fixture
def command(monkeypatch, pretrained, run_main):
    """Runs the command on an in-memory model; returns exit code, stdout and stderr."""
    saved = types.SimpleNamespace(path="a model", contents=types.SimpleNamespace(lineage=()))
    monkeypatch.setattr(evaluation, "open_model", lambda path: saved)
    monkeypatch.setattr(evaluation, "load_saved", lambda saved, tokenizer: pretrained)
    return functools.partial(run_main, main)


@pytest.mark.usefixtures("only_local_tasks")
def test_command_prints_and_writes_scores(command, measured, task_dir, tmp_path):
    output = tmp_path / "results.json"
    arguments = ("--task-dir", task_dir, "--tasks", "both", "--output", output)
    code, printed, error = command("runs/mine", *arguments)
    assert (code, error) == (0, "")
    results = json.loads(output.read_text())
    for task in ("choices", "rolling"):
        written, reference = results["tasks"][task], measured[0]["results"][task]
        assert (written["version"], written["num_fewshot"]) == (3, 0)
        for metric in written["metrics"]:
            if metric != "word_perplexity_stderr" and metric != "byte_perplexity_stderr":
                assert written["metrics"][metric] == pytest.approx(reference[f"{metric},none"])
    assert results["tasks"]["choices"]["num_documents"] == 16
    assert (results["tokens"], results["checkpoint"]) == (None, "a model")
    accuracy = results["tasks"]["choices"]["metrics"]["acc"]
    assert f"choices  0      acc              {accuracy:.4f}" in printed
    assert str(output) in printed
    assert "Lambada" not in printed and "bootstrapping" not in printed


def results_of(scores: dict[str, float]) -> dict:
    metric = dict.fromkeys(ACCURACY_TASKS, "acc") | {"wikitext": "word_perplexity"}
    tasks = {
        name: {
            "num_fewshot": 0,
            "metrics": {metric[name]: value, f"{metric[name]}_stderr": 0.1},
        }
        for name, value in scores.items()
    }
    return {"model": "runs/mine", "tokens": 2_000_000, "limit": None, "tasks": tasks}


def test_table_includes_published_scores():
    accuracies = {name: (30 + i) / 100 for i, name in enumerate(ACCURACY_TASKS)}
    lines = tell(results_of(accuracies | {"wikitext": 17.123})).splitlines()
    assert lines[1].split() == [
        *("runs/mine", "2.00M"),
        *(f"{30 + i}.00" for i in range(7)),
        *("33.00", "17.12"),
    ]
    assert len(lines) == 2 + len(PUBLISHED_SCORES)
    assert lines[2].split("  ")[0] == "G_stack 1.1B"
    assert lines[2].endswith("81.10  56.03       52.80    16.73     Fig. 3")


def test_average_requires_all_tasks():
    printed = tell(results_of({"piqa": 0.5})).splitlines()[1]
    assert printed.split() == ["runs/mine", "2.00M", *"----", "50.00", *"----"]


@pytest.mark.parametrize("row", PUBLISHED_SCORES, ids=lambda row: row.name)
def test_published_averages_match_published_accuracies(row):
    assert 40 < row.average < 60
    if row.accuracies:
        mean = sum(row.accuracies.values()) / len(ACCURACY_TASKS)
        # Published values have two decimals.
        assert row.average == pytest.approx(mean, abs=0.0101)


@pytest.mark.slow
def test_paper_tasks_exist_in_the_harness():
    assert set(PAPER_TASKS) <= set(lm_eval.tasks.TaskManager().all_tasks)


@pytest.fixture
def error_of(command):
    """Runs the command with an error; returns the error line."""

    def run(*arguments) -> str:
        code, _, error = command(*arguments)
        assert (code, error.count("\n")) == (2, 1)
        assert error.startswith("error: ")
        return error

    return run


@pytest.mark.usefixtures("only_local_tasks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "choices,chioces"), "no task 'chioces' .* choices"),
        (
            ("--tasks", "choices", "--task-dir", "no/where"),
            "no/where is not a directory",
        ),
        (("--tasks", "choices", "--output", "no/where.json"), "there is no directory .*/no;"),
    ],
)
def test_invalid_argument_is_one_line(error_of, task_dir, arguments, message):
    assert re.search(message, error_of("runs/mine", "--task-dir", task_dir, *arguments))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--limit", "0", "limit is 0"),
        ("--batch-size", "0", "batch_size is 0"),
        ("--num-fewshot", "-1", "num_fewshot is -1"),
    ],
)
def test_option_out_of_range_is_refused_by_name(error_of, option, value, message):
    assert message in error_of("runs/mine", option, value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/results.json", "there is no directory"),
        ("directory", "a directory; name a file in it"),
        ("results.json", "exists already; name another file with --output"),
        ("link.json", "exists already"),
        ("pipe.json", "exists already"),
    ],
)
def test_output_must_be_a_new_file(name, message, tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "results.json").write_text("results")
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=message):
        check_new_file("output", tmp_path / name)
    check_new_file("output", tmp_path / "new.json")
    assert (tmp_path / "results.json").read_text() == "results"


def test_read_only_output_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"output is .*new\.json"):
        check_new_file("output", tmp_path / "new.json")


@pytest.mark.usefixtures("only_local_tasks")
def test_failed_download_is_one_line(error_of, task_dir, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'a/set' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    error = error_of("m", "--task-dir", task_dir, "--tasks", "choices")
    assert "data of task 'choices' cannot be loaded: Couldn't" in error


def test_missing_harness_is_one_line(error_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "pip install -r requirements-interop.txt" in error_of("runs/mine")
