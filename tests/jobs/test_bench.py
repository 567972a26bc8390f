"""What benchmarks are made of: counts of operations, workloads, and that they run at all."""

from __future__ import annotations

import io
import json
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

from gc2ray.core.intervals import MeanInterval
from gc2ray.core.schema import stats_of
from gc2ray.estimation.recommendation import Measured, Tuning
from gc2ray.estimation.retentions import TUNED_RETENTIONS
from gc2ray.estimation.trials import BASELINE, CompressionSetting
from gc2ray.models import loading
from gc2ray.models.families.tiny import TinySpec, build_tiny, untrained
from gc2ray.models.shape import LLAVA_7B, ModelShape
from jobs import bench
from jobs.benchmarks import Line, end_to_end, full_size, language, reporting, tuning
from jobs.benchmarks.support.inputs import IN_PROPORTION
from jobs.benchmarks.support.peers import Batches, one_by_one
from jobs.benchmarks.support.ragged import ANSWER, PROMPT, REQUESTS, ragged_requests
from jobs.benchmarks.support.roofline import Machine, Stage
from jobs.benchmarks.support.timing import Times, in_turn, time_ratios

MACHINE = Machine(plain=50e9, packed=100e9, plain_logits=20e9, packed_logits=40e9, bytes_per_s=10e9)


def test_the_ragged_workload_has_the_documented_lengths() -> None:
    requests = ragged_requests(1000)
    prompts, answers = zip(*((len(r.prompt), r.new_tokens) for r in requests), strict=True)
    assert len(requests) == REQUESTS
    assert (min(prompts), max(prompts)) == PROMPT == (68, 700)
    assert (min(answers), max(answers)) == ANSWER == (8, 128)
    assert sum(prompts) == pytest.approx(18_900, rel=0.01)
    assert sum(answers) == pytest.approx(2115, rel=0.01)
    assert list(prompts) != sorted(prompts)
    assert list(answers) != sorted(answers)
    assert all(int(r.prompt.min()) >= 3 and int(r.prompt.max()) < 1000 for r in requests)
    again = ragged_requests(1000)
    assert all(a.prompt.equal(b.prompt) for a, b in zip(requests, again, strict=True))


def test_ideal_time_is_the_longer_of_products_and_bytes() -> None:
    assert MACHINE.packed_gain == 2
    stages = [Stage(flops=200e9, bytes_read=1e9), Stage(flops=100e9, bytes_read=30e9)]
    assert MACHINE.ideal_seconds(stages) == 2 + 3
    assert "does not hold" not in MACHINE.line().goal
    slow = Machine(100e9, 50e9, 1, 1, 1)
    assert slow.flops_per_s == 100e9
    assert "does not hold" in slow.line().goal


def test_compared_benchmarks_run_in_turn() -> None:
    seen: list[str] = []
    works = {name: partial(seen.append, name) for name in "ab"}
    times = in_turn(works, 2, check=lambda: seen.append("check"))
    assert seen == ["a", "b", "check", "b", "a"]
    assert len(times["a"].wall) == len(times["b"].cpu) == 2
    slow, fast = Times([2.0, 6.0, 4.0], [1.0, 1.0, 1.0]), Times([1.0, 2.0, 4.0], [0.5, 1.0, 2.0])
    assert time_ratios(slow, fast) == {"ratio_wall": 2.0, "ratio_cpu": 1.0}


def test_sizes_of_a_tiny_model_can_be_set() -> None:
    usual = untrained(TinySpec())[0].state_dict()
    spelled = untrained(TinySpec(vision_ffn=64, text_ffn=96, table=1))[0].state_dict()
    assert usual.keys() == spelled.keys()
    assert all(usual[name].equal(spelled[name]) for name in usual)
    model, _ = untrained(TinySpec(vision_ffn=40, text_ffn=56, table=1000))
    shape = ModelShape.from_config(model.config, 4)
    assert (shape.text.vocabulary, shape.text.ffn, shape.tower.ffn) == (1000, 56, 40)
    assert model.get_output_embeddings().weight.shape == (1000, 48)


def test_the_model_in_proportion_is_a_7b_in_small() -> None:
    with torch.device("meta"):
        model, _ = untrained(IN_PROPORTION)
    small, seven = ModelShape.from_config(model.config, 4), LLAVA_7B
    assert small.tower.patches == seven.tower.patches
    assert small.text.layers * seven.tower.layers == seven.text.layers * small.tower.layers

    def vision_share(shape: ModelShape) -> float:
        vision = shape.tower.whole(5) + shape.tower.projector(2400)
        return vision / (vision + shape.text.prefill(2500) + shape.text.decode(2500, 32))

    assert vision_share(small) == pytest.approx(0.05, abs=0.01)
    assert vision_share(seven) == pytest.approx(0.055, abs=0.01)


def test_static_batches_write_what_one_by_one_does() -> None:
    model = language.random_llama(width=32, layers=2, vocabulary=200)
    requests = ragged_requests(200, count=7)
    wanted = one_by_one(model, requests)
    assert [len(tokens) for tokens in wanted] == [request.new_tokens for request in requests]
    for batches in (Batches(3, by_length=True), Batches(2, by_length=False)):
        assert batches.answer(model, requests) == wanted


def test_the_language_benchmark_runs() -> None:
    model = language.random_llama(width=32, layers=2, vocabulary=200)
    lines = language.measure(model, ragged_requests(200, count=6), MACHINE, turns=1)
    whole = [line for line in lines if "same_answers" in line.figures]
    assert {line.figures["same_answers"] for line in whole} == {6}
    assert len(whole) >= 4
    check_lines(lines)


def test_the_end_to_end_benchmark_runs(tmp_path: Any) -> None:
    path = build_tiny(tmp_path, TinySpec())
    loaded = loading.load(str(path), revision=None, dtype="float32", device="cpu")
    loaded.model.generation_config.eos_token_id = None
    files = []
    for size in ((200, 90), (160, 160)):
        buffer = io.BytesIO()
        Image.effect_noise(size, 60).convert("RGB").save(buffer, "JPEG")
        files.append(buffer.getvalue())
    lines = end_to_end.measure(loaded, files, MACHINE, turns=1)
    ours = [line for line in lines if "share_prefill" in line.figures]
    assert len(ours) == len(end_to_end.RETENTIONS)
    shares = [value for name, value in ours[0].figures.items() if name.startswith("share_")]
    assert len(shares) == 7
    check_lines(lines)


def check_lines(lines: list[Line]) -> None:
    assert len({line.what for line in lines}) == len(lines), "two lines with one name"
    assert any("ratio_wall" in line.figures for line in lines)
    assert all(value >= 0 for line in lines for value in line.figures.values())


def test_full_size_prints_a_line_for_each_retention() -> None:
    lines = full_size.run("tiny", rows=1)
    assert len(lines) == 1 + len(full_size.RETENTIONS)
    tokens = [line.figures["visual_tokens"] for line in lines[1:]]
    assert tokens[0] == 2880
    assert tokens == sorted(tokens, reverse=True)
    assert all(line.figures["share_of_roofline"] > 0 for line in lines[1:])
    assert lines[1].figures["speed_up"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_full_size_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--model", "llava-next-7b", "--random-weights"])
    assert ended.value.code == 2
    assert "llava-next-7b needs a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--model", "llava-next-7b"])
    assert "--random-weights" in capsys.readouterr().err


def test_threads_apply_to_every_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def seen() -> list[Line]:
        return [Line("threads", {"count": torch.get_num_threads()})]

    before = torch.get_num_threads()
    monkeypatch.setitem(bench.BENCHMARKS, "borders", seen)
    try:
        bench.main(["--only", "borders", "--threads", "2"])
    finally:
        torch.set_num_threads(before)
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["borders"][0]["figures"]["count"] == 2
    assert document["hardware"]["torch_threads"] == 2
    with pytest.raises(SystemExit) as ended:
        bench.main(["--threads", "0"])
    assert ended.value.code == 2
    assert "--threads must be at least 1, got 0" in capsys.readouterr().err


def test_the_tuning_benchmark_runs() -> None:
    lines = tuning.run(samples=1, rows=16, fresh=20)
    assert len(lines) == 1 + len(TUNED_RETENTIONS) + 1 + 1
    assert [line.figures["of"] for line in lines if "of" in line.figures] == [1]
    assert all("accuracy" in line.figures for line in lines[:6])
    assert lines[0].figures["speed_up"] == 1


def test_recommendations_are_checked_on_fresh_rows() -> None:
    """The quarter is the cheapest that is right; the tenth is not right."""
    kept = {1.0: (4.0, 0.95), 0.5: (2.6, 0.93), 0.25: (2.0, 0.91), 0.1: (1.0, 0.8)}
    truth = {}
    for retention, (seconds, accuracy) in kept.items():
        setting = BASELINE if retention == 1 else CompressionSetting("globalcom2", retention)
        quality = MeanInterval(accuracy - 0.01, accuracy, accuracy + 0.01, 2000)
        speed = MeanInterval(1, 4 / seconds, 4, 8)
        truth[setting] = Measured(setting, seconds, speed, 9, quality, quality, None, meets=True)

    def verdict(*recommended: float | None) -> Line:
        settings = {setting.retention: setting for setting in truth}
        chosen = [None if r is None else settings[r] for r in recommended]
        return tuning.verdicts([Tuning((), one, "") for one in chosen], truth)[-1]

    good = verdict(*[0.25] * 9, 0.1)
    assert good.figures == {"right": 9, "of": 10, "dearest": 1}
    assert good.goal.endswith(": met")
    assert verdict(*[0.25] * 8, 0.1, 0.1).goal.endswith(": missed")
    dear = verdict(*[0.25] * 9, 0.5)
    assert dear.figures == {"right": 10, "of": 10, "dearest": 1.3}
    assert dear.goal.endswith(": missed")
    assert verdict(None).figures == {"right": 0, "of": 1, "dearest": 2}


@pytest.mark.ray
@pytest.mark.slow
def test_the_reporting_benchmark_runs() -> None:
    (line,) = reporting.run(parts=2, runs=1)
    assert line.what == "a report of 200 rows in 2 parts"
    assert line.figures["seconds"] > 0
    assert 50 < line.figures["peak_mb"] < 2000


def test_answers_of_the_reporting_benchmark_are_whole() -> None:
    """What they say of their tokens agrees, so that the report has something in every place."""
    kinds = [reporting.made_up(kind) for kind in range(reporting.KINDS)]
    stats = stats_of(kinds)
    assert stats.view_tokens_kept.keys() == stats.view_tokens_full.keys() == {*"01234"}
    assert sum(stats.view_tokens_kept.values()) == stats.visual_tokens_kept
    assert sum(stats.view_tokens_full.values()) == stats.visual_tokens_full
    assert 0.2 < stats.visual_tokens_kept / stats.visual_tokens_full < 0.3
    assert all(stats.flops[stage] < stats.flops_full[stage] for stage in ("compress", "prefill"))
