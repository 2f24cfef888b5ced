"""The evaluation driver on a tiny model with adapters that PEFT made, and its figures against enumeration."""

import io
import itertools
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.evaluation import command
from nemo_rl_lora.evaluation.estimates import estimate, pass_at_k
from nemo_rl_lora.evaluation.models import LoadedBase, check_evaluation
from nemo_rl_lora.evaluation.report import EvaluationConsole
from nemo_rl_lora.evaluation.results import Outcome, ScoredCompletion, summarise
from nemo_rl_lora.generation.in_process.engine import InProcessGeneration
from nemo_rl_lora.lora.files import ADAPTER_FILE
from tests.config.schema_walk import flippable_leaves
from tests.config.traced_run import Reads
from tests.driver import REWARD, Ended
from tests.evaluation.evaluation_runs import run_eval, save_peft_adapter

BASE = "(base)"


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory) -> tuple[Path, Path]:
    """Two adapters of different rank, scale and modules."""
    root = tmp_path_factory.mktemp("adapters")
    few = save_peft_adapter(tiny_llama, root / "few", 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    many = save_peft_adapter(
        tiny_llama,
        root / "many",
        2,
        r=2,
        lora_alpha=3,
        target_modules="all-linear",
        use_rslora=True,
        rank_pattern={"down_proj": 3},
        alpha_pattern={"o_proj": 7},
    )
    return few, many


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyEval:
    """Evaluations of the tiny model: 6 prompts, greedy, 12 tokens, with a reward that depends on the text."""

    root: Path
    model: Path

    def arguments(self, *overrides: str) -> list[str]:
        reward_file = self.root / "rewards.py"
        reward_file.write_text(REWARD)
        return [
            f"policy.model_name={self.model}",
            "policy.precision=float32",
            "policy.generation.max_new_tokens=12",
            "data.validation.num_rows=6",
            "data.default.env_name=tiny",
            f"+env.tiny.reward_function={reward_file}:reward",
            f"eval.save_path={self.path}",
            *overrides,
        ]

    def __call__(self, *overrides: str) -> Ended:
        return run_eval(*self.arguments(*overrides))

    @property
    def path(self) -> Path:
        return self.root / "evaluation"

    def results(self) -> dict:
        return json.loads((self.path / "results.json").read_text())

    def completions(self, model: str) -> list[dict]:
        lines = [json.loads(line) for line in (self.path / "completions.jsonl").read_text().splitlines()]
        return [line for line in lines if line["model"] == model]


@pytest.fixture
def tiny_eval(tiny_llama, tmp_path) -> TinyEval:
    return TinyEval(root=tmp_path, model=tiny_llama)


def named(*adapters: Path) -> str:
    return f"eval.adapters=[{','.join(map(str, adapters))}]"


def greedy_texts(model_path: Path, adapter: Path | None, questions: list[str]) -> list[str]:
    """What transformers and PEFT generate by themselves, prompt by prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    texts = []
    for question in questions:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=12, pad_token_id=0)
        texts.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
    return texts


# What is sampled


@pytest.mark.parametrize("lora_sync", ["merged", "adapter"])
def test_greedy_completions_of_the_base_and_of_each_adapter_are_those_of_peft(tiny_eval, adapters, lora_sync):
    ended = tiny_eval(named(*adapters), f"policy.generation.lora_sync={lora_sync}")

    assert ended.code == 0, ended.err
    questions = [line["prompt"] for line in tiny_eval.completions(BASE)]
    assert len(questions) == 6
    texts = {}
    for name, adapter in ((BASE, None), *((str(adapter), adapter) for adapter in adapters)):
        texts[name] = [line["completion"] for line in tiny_eval.completions(name)]
        assert texts[name] == greedy_texts(tiny_eval.model, adapter, questions)
    assert len({tuple(of_model) for of_model in texts.values()}) == 3, "the models say the same"


@pytest.mark.parametrize("lora_sync", ["merged", "adapter"])
def test_the_base_in_memory_is_bit_for_bit_what_was_loaded(tiny_eval, adapters, lora_sync):
    overrides = tiny_eval.arguments(named(*adapters), f"policy.generation.lora_sync={lora_sync}")
    checked = check_evaluation(load_config(None, overrides, "eval"), weights=True)
    base = LoadedBase(checked)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    for candidate in checked.candidates:
        with base.serve(candidate) as generation:
            assert generation is not None
    after = base.model.state_dict()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    base.require_unwritten()
    with torch.no_grad():
        base.model.get_parameter("model.layers.1.mlp.down_proj.weight")[0, 0] += 1e-3
    with pytest.raises(RuntimeError, match="the base's weights have changed during the evaluation"):
        base.require_unwritten()


def test_adapters_served_beside_the_base_need_no_copy_of_it(tiny_eval, adapters):
    overrides = tiny_eval.arguments(named(*adapters), "policy.generation.lora_sync=adapter")
    checked = check_evaluation(load_config(None, overrides, "eval"), weights=True)
    base = LoadedBase(checked)
    of_base = {parameter.data_ptr() for parameter in base.model.parameters()}
    for candidate in checked.candidates:
        with base.serve(candidate) as generation:
            assert isinstance(generation, InProcessGeneration)
            projections = generation._decoder.projections
            adapted = {name for name, projection in projections.items() if projection.adapter is not None}
            assert adapted == {module.name for module in candidate.adapted}
            assert {projection.weight.data_ptr() for projection in projections.values()} <= of_base


def test_without_the_base_an_adapter_stands_alone(tiny_eval, adapters):
    ended = tiny_eval(named(adapters[0]), "eval.include_base=false")

    assert ended.code == 0, ended.err
    (figures,) = tiny_eval.results()["models"].values()
    assert figures["gain"] is None
    assert "over base" not in ended.out


def test_an_adapter_that_changes_on_disk_after_the_check_is_not_evaluated(tiny_eval):
    few = save_peft_adapter(
        tiny_eval.model, tiny_eval.root / "few", 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]
    )
    checked = check_evaluation(load_config(None, tiny_eval.arguments(named(few)), "eval"), weights=True)
    save_peft_adapter(tiny_eval.model, few, 3, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    base = LoadedBase(checked)
    with pytest.raises(RuntimeError, match="the adapter's file has changed"), base.serve(checked.candidates[1]):
        raise AssertionError("it is served")


def test_an_evaluation_without_memory_names_keys_that_take_less(tiny_eval, monkeypatch):
    def collect(engine, tickets):
        raise MemoryError

    monkeypatch.setattr(InProcessGeneration, "collect", collect)
    ended = tiny_eval("policy.generation.max_concurrent_sequences=3")
    assert ended.code == 1
    lines = ended.err.split("The run failed: ")[1].splitlines()
    assert lines[0] == "MemoryError"
    assert lines[1].startswith("Out of memory in sampling; the peak was ")
    assert lines[2].startswith("policy.generation.max_concurrent_sequences=3: ")
    assert lines[3].startswith("policy.generation.lora_sync='auto': ")


def test_a_step_of_a_grpo_run_scores_what_the_run_said_of_it(tiny_run, tiny_eval):
    common = ["data.validation.num_rows=6", "policy.generation.val_temperature=0", "policy.generation.max_new_tokens=6"]
    ended = tiny_run(
        *common,
        "grpo.max_num_steps=1",
        "grpo.val_at_end=true",
        "policy.optimizer.kwargs.lr=0.2",
        "policy.scheduler=null",
    )
    assert ended.code == 0, ended.err
    step = tiny_run.checkpoints / "step_1"

    ended = tiny_eval(*common, named(step))

    assert ended.code == 0, ended.err
    result = tiny_eval.results()["models"][str(step)]
    assert result["num_changed"] > 0
    assert result["accuracy"]["mean"] == pytest.approx(tiny_run.metrics("validation")[-1]["accuracy"])
    assert result["directory"] == str(step / "policy" / "adapter")
    assert "WARNING" not in ended.err


def test_seeds_are_the_same_for_every_model_and_however_many_are_asked_at_once(tiny_eval, adapters):
    sampled = ["policy.generation.val_temperature=1", "eval.num_tests_per_prompt=3"]
    assert tiny_eval(*sampled, named(adapters[0])).code == 0
    few_at_once = TinyEval(root=tiny_eval.root / "other", model=tiny_eval.model)
    few_at_once.root.mkdir()
    limits = ["policy.generation.max_concurrent_sequences=3", "eval.max_num_prompts=4"]
    assert few_at_once(*sampled, *limits).code == 0

    def seeds(run: TinyEval, model: str) -> list[tuple]:
        return [(line["prompt"], line["completion_index"], line["seed"]) for line in run.completions(model)]

    of_base = seeds(tiny_eval, BASE)
    assert len({seed for *_, seed in of_base}) == 6 * 3
    assert seeds(tiny_eval, str(adapters[0])) == of_base
    assert seeds(few_at_once, BASE) == of_base[: 4 * 3]
    other = TinyEval(root=tiny_eval.root / "seed", model=tiny_eval.model)
    other.root.mkdir()
    assert other(*sampled, "eval.seed=43").code == 0
    assert not {seed for *_, seed in of_base} & {seed for *_, seed in seeds(other, BASE)}


def test_gsm8k_from_files_is_scored_by_math_verify(tiny_eval):
    directory = tiny_eval.root / "gsm8k"
    directory.mkdir()
    rows = [{"question": f"{i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(3)]
    (directory / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    ended = tiny_eval(
        f"data.validation={{_override_: true, dataset_name: gsm8k, data_path: '{directory}', split: test}}",
        "data.default.env_name=math",
        "eval.max_num_prompts=2",
    )

    assert ended.code == 0, ended.err
    assert [line["prompt"] for line in tiny_eval.completions(BASE)] == ["0 + 1?", "1 + 1?"]
    assert tiny_eval.results()["models"][BASE]["environment_metrics"] == {
        "math_verify_timeouts": 0.0,
        "math_unreadable_answers": 0.0,
    }


# What is computed


def test_pass_at_k_is_the_share_of_sets_of_k_with_a_solved_one():
    for n in range(1, 7):
        for c in range(n + 1):
            solved = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                sets = list(itertools.combinations(solved, k))
                assert pass_at_k([0.0] * (n - c) + [1.0] * c, k) == pytest.approx(sum(map(any, sets)) / len(sets)), (
                    n,
                    c,
                    k,
                )


def test_pass_at_k_of_graded_rewards_is_the_mean_best_of_the_sets_of_k():
    rewards = [0.25, 0.1, 1.0, 0.1, 0.7]
    for k in range(1, 6):
        best = [max(chosen) for chosen in itertools.combinations(rewards, k)]
        assert pass_at_k(rewards, k) == pytest.approx(statistics.fmean(best)), k
    assert pass_at_k(rewards, 5) == max(rewards)


def test_the_interval_of_a_mean_is_1_96_standard_errors():
    # deviations -1, 0, 1: variance 1, standard error 1 / sqrt(3)
    assert estimate([1.0, 2.0, 3.0]).mean == 2.0
    assert estimate([1.0, 2.0, 3.0]).half_width == pytest.approx(1.96 / 3**0.5)
    assert estimate([5.0]).half_width is None
    assert estimate([1.0, 1.0]).half_width is None


def outcome(*rewards: float, texts: str = "") -> Outcome:
    """Completions with these rewards, two of a prompt."""
    completions = tuple(
        ScoredCompletion(
            model="m",
            prompt_index=i // 2,
            completion_index=i % 2,
            seed=i,
            prompt="p",
            completion=texts[i] if texts else "",
            reward=reward,
            num_tokens=i + 1,
            finish_reason="length" if i == 0 else "stop",
        )
        for i, reward in enumerate(rewards)
    )
    return Outcome(completions=completions, environment_metrics={}, generation_seconds=1.0, reward_seconds=2.0)


def test_figures_of_a_model_against_the_base_are_paired_by_prompt():
    base = outcome(0.0, 0.0, 0.5, 0.5, 1.0, 1.0, texts="abcdef")
    result = summarise(
        outcome(0.5, 0.0, 0.5, 1.0, 1.0, 1.0, texts="abXXeX"),
        num_completions=2,
        k_values=[1, 2],
        solved_at=1.0,
        base=base,
    )

    # prompt means 0.25, 0.75, 1 against 0, 0.5, 1; solved 0, 1, 2 of 2
    assert result.accuracy.mean == pytest.approx(2 / 3)
    assert result.gain is not None
    assert result.gain.mean == pytest.approx(1 / 6)
    assert result.gain.half_width == pytest.approx(1.96 * statistics.stdev([0.25, 0.25, 0.0]) / 3**0.5)
    assert result.pass_at[1].mean == pytest.approx((0 + 0.5 + 1) / 3)
    assert result.pass_at[2].mean == pytest.approx((0 + 1 + 1) / 3)
    assert result.num_changed == 3
    assert (result.mean_num_tokens, result.truncated_share) == (3.5, pytest.approx(1 / 6))


def test_solved_at_says_from_which_reward_on_a_completion_is_solved():
    half = summarise(outcome(0.5, 0.0), num_completions=2, k_values=[1], solved_at=0.5, base=None)
    whole = summarise(outcome(0.5, 0.0), num_completions=2, k_values=[1], solved_at=1.0, base=None)
    assert (half.pass_at[1].mean, whole.pass_at[1].mean) == (0.5, 0.0)
    assert half.gain is None


def test_results_agree_with_the_completions_beside_them(tiny_eval, adapters):
    ended = tiny_eval(
        named(*adapters),
        "policy.generation.val_temperature=1",
        "eval.num_tests_per_prompt=4",
        "eval.k_values=[1,2,4]",
        "eval.solved_at=0.75",
    )

    assert ended.code == 0, ended.err
    results = tiny_eval.results()
    assert results["complete"]
    assert list(results["models"]) == [BASE, *map(str, adapters)]
    for name, figures in results["models"].items():
        rewards = [line["reward"] for line in tiny_eval.completions(name)]
        assert figures["accuracy"]["mean"] == pytest.approx(statistics.fmean(rewards))
        for k in (1, 2, 4):
            hits = [
                any(reward >= 0.75 for reward in chosen)
                for begin in range(0, len(rewards), 4)
                for chosen in itertools.combinations(rewards[begin : begin + 4], k)
            ]
            assert figures[f"pass@{k}"]["mean"] == pytest.approx(statistics.fmean(hits))
    assert len({figures["adapter_digest"] for figures in results["models"].values()}) == 3
    config = load_config(tiny_eval.path / "config.yaml", [], "eval")
    assert config.eval.k_values == (1, 2, 4)


# What is said


def test_the_table_has_a_row_for_each_model_and_says_what_was_measured(tiny_eval, adapters):
    ended = tiny_eval(named(*adapters), "eval.save_path=null")

    assert ended.code == 0, ended.err
    table = ended.out[ended.out.index("model  ") :]
    assert table.split("\n")[0].split() == ["model", "accuracy", "over", "base", "pass@1", "tokens", "cut", "time"]
    assert "6 prompts, 1 completion(s) each" in table
    for adapter in adapters:
        assert f"{adapter}: 6 of 6 completions are not the base's." in ended.out
    assert f"{BASE}: 6 of 6 prompts, accuracy so far " in ended.out
    assert not tiny_eval.path.exists()


def test_the_bar_shows_how_many_prompts_are_done_and_their_accuracy():
    out = io.StringIO()
    console = EvaluationConsole(num_prompts=4, num_completions=2, file=out)
    console.model("m")
    console.batch(outcome(1.0, 0.0, 1.0, 1.0).completions)

    assert out.getvalue() == "m: 2 of 4 prompts, accuracy so far 0.750\n"
    console.console.print(console._bar())
    shown = out.getvalue().splitlines()[-1]
    assert shown.startswith("m ")
    assert all(part in shown for part in ("2/4", "elapsed", "left", "accuracy 0.750"))


def test_an_adapter_of_zeros_scores_as_the_base_and_is_named(tiny_eval):
    zero = save_peft_adapter(tiny_eval.model, tiny_eval.root / "zero", 1, 0.0, r=2, target_modules=["q_proj"])

    ended = tiny_eval(named(zero))

    assert ended.code == 0, ended.err
    assert f"WARNING eval.adapters='{zero}': every B is zero, so this adapter is the base." in ended.err
    assert f"{zero}: 0 of 6 completions are not the base's." in ended.out
    texts = [[line["completion"] for line in tiny_eval.completions(name)] for name in (BASE, str(zero))]
    assert texts[0] == texts[1]


def test_an_adapter_of_another_base_or_template_is_warned_of(tiny_eval, adapters):
    step = tiny_eval.root / "step_1"
    (step / "policy" / "tokenizer").mkdir(parents=True)
    (step / "policy" / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    shutil.copytree(adapters[0], step / "policy" / "adapter")
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    other = tiny_eval.root / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    shutil.copy(adapters[0] / "adapter_model.safetensors", other)

    ended = tiny_eval("--plan", named(step, other))

    assert ended.code == 0, ended.err
    assert f"eval.adapters='{step}': was trained with another chat template" in ended.out
    model = str(tiny_eval.model)
    said = f"eval.adapters='{other}': was made for org/other, and is evaluated on policy.model_name={model!r}."
    assert said in ended.out
    assert ended.out.count("Warning:") == 2


def test_the_base_by_another_path_is_no_other_base(tiny_eval, adapters):
    model = tiny_eval.model
    ended = tiny_eval("--plan", named(*adapters), f"policy.model_name={model}/../{model.name}")

    assert ended.code == 0, ended.err
    assert "Warning" not in ended.out


def test_the_plan_shows_every_model_and_loads_no_weight(tiny_eval, adapters, no_weights, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # room for a path in a line of the table

    ended = tiny_eval("--plan", named(*adapters))

    assert ended.code == 0, ended.err
    assert "Asked: 6 prompts, 1 completion(s) each, greedy, of at most 12 tokens; scored by tiny" in ended.out
    lines = "".join(ended.out.split())
    # q: 4 x (48 + 48), v: 4 x (48 + 24), in two layers
    assert f"{adapters[0]}484{2 * 4 * (96 + 72):,}" in lines
    assert not list(tiny_eval.path.glob("*"))


def test_a_signal_ends_the_evaluation_after_the_model_that_was_nearly_done(tiny_eval, adapters):
    (tiny_eval.root / "stops.py").write_text(
        "import os, signal\n"
        "def reward(prompt, completion, row):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return 1.0\n"
    )

    ended = tiny_eval(named(*adapters), f"env.tiny.reward_function={tiny_eval.root}/stops.py:reward")

    assert ended.code == 130
    assert "Stopped by SIGINT: 1 of 3 models were evaluated." in ended.out
    assert not tiny_eval.results()["complete"]
    assert list(tiny_eval.results()["models"]) == [BASE]


def test_a_reward_that_raises_ends_the_evaluation_and_names_its_row(tiny_eval):
    (tiny_eval.root / "raises.py").write_text("def reward(prompt, completion, row):\n    return 1 / 0\n")

    ended = tiny_eval(f"env.tiny.reward_function={tiny_eval.root}/raises.py:reward")

    assert ended.code == 1
    assert "ZeroDivisionError" in ended.err
    assert (tiny_eval.path / "run.log").exists()


# What is refused


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""

    def load_model(*_, **__):
        raise AssertionError("weights were to be loaded")

    monkeypatch.setattr("nemo_rl_lora.evaluation.models.load_model", load_model)


@pytest.fixture
def wrong(tiny_llama, tmp_path) -> Path:
    """A directory of things that are no adapter of the tiny model."""
    config = LlamaForCausalLM.from_pretrained(tiny_llama).config
    config.num_hidden_layers, config.hidden_size = 3, 64
    wide = tmp_path / "wide"
    LlamaForCausalLM(config).save_pretrained(wide)
    save_peft_adapter(wide, tmp_path / "of_wide", 1, r=2, target_modules=["q_proj"])
    config.num_hidden_layers = 2
    LlamaForCausalLM(config).save_pretrained(wide)
    save_peft_adapter(wide, tmp_path / "of_wide_2", 1, r=2, target_modules=["q_proj"])
    save_peft_adapter(tiny_llama, tmp_path / "dora", 1, r=2, target_modules=["q_proj"], use_dora=True)
    adapter = save_peft_adapter(tiny_llama, tmp_path / "holes", 1, r=2, target_modules=["q_proj"]) / ADAPTER_FILE
    tensors = {name: tensor for name, tensor in load_file(adapter).items() if "layers.1." not in name}
    save_file(tensors, adapter)
    for name in ("run/step_5", "run/step_10", "full/policy/weights", "empty"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "results.json").write_text("{}")
    (tmp_path / "step_5").mkdir()
    (tmp_path / "step_5" / "config.yaml").write_text("{}")
    return tmp_path


# fmt: off
WRONG = {
    "a missing adapter": ("eval.adapters=[{tmp}/none]",
     "eval.adapters='{tmp}/none': there is no such directory (looked for {tmp}/none). Correct the path."),
    "a whole run": ("eval.adapters=[{tmp}/run]",
     "eval.adapters='{tmp}/run': is the directory of a whole run. Name one of its steps: step_5, step_10."),
    "a step of full fine-tuning": ("eval.adapters=[{tmp}/full]",
     "eval.adapters='{tmp}/full': holds all weights of a model and no adapter. Evaluate it by itself: "
     "policy.model_name={tmp}/full/policy/weights policy.tokenizer.name={tmp}/full/policy/tokenizer."),
    "a directory without an adapter": ("eval.adapters=[{tmp}/empty]",
     "eval.adapters='{tmp}/empty': holds no adapter_config.json, only nothing. Give the directory of a step (step_N), "
     "or of an adapter that PEFT wrote."),
    "an adapter with more layers": ("eval.adapters=[{tmp}/of_wide]",
     "eval.adapters='{tmp}/of_wide': does not fit policy.model_name='{model}': the adapter changes "
     "model.layers.2.self_attn.q_proj, which it does not have or adapter_config.json does not target. "
     "It was made for {tmp}/wide: use it on that."),
    "an adapter of another width": ("eval.adapters=[{tmp}/of_wide_2]",
     "eval.adapters='{tmp}/of_wide_2': does not fit policy.model_name='{model}': lora_A of "
     "model.layers.0.self_attn.q_proj is [2, 64], and [2, 48] is needed there. "
     "It was made for {tmp}/wide: use it on that."),
    "an adapter without one of its modules": ("eval.adapters=[{tmp}/holes]",
     "eval.adapters='{tmp}/holes': does not fit policy.model_name='{model}': the adapter has no tensors for "
     "model.layers.1.self_attn.q_proj. Use one whose two files belong together, made for this model."),
    "a DoRA adapter": ("eval.adapters=[{tmp}/dora]",
     "eval.adapters='{tmp}/dora': adapter tensor 'base_model.model.model.layers.0.self_attn.q_proj"
     ".lora_magnitude_vector': is not of the form base_model.model.<module>.lora_A.weight or ...lora_B.weight. Only "
     "plain LoRA adapters are supported (no DoRA, embeddings or modules_to_save)."),
    "results of an earlier evaluation": ("eval.save_path={tmp}/earlier",
     "eval.save_path='{tmp}/earlier': holds results.json, which an evaluation writes itself. Name another "
     "directory, or move the file away."),
    "a directory with a configuration": ("eval.save_path={tmp}/step_5",
     "eval.save_path='{tmp}/step_5': holds config.yaml, which an evaluation writes itself. Name another "
     "directory, or move the file away."),
    "more positions than the model has": ("policy.max_total_sequence_length=512",
     "policy.max_total_sequence_length=512: {model} has 256 positions. Set it to 256 or less."),
    "CUDA graphs without a GPU": ("policy.generation.cuda_graphs=true",
     "policy.generation.cuda_graphs=True: a CUDA graph needs a GPU, and torch finds none. "
     "Set it to auto, or remove it."),
    "a data file that is missing":
     ("data.validation={{_override_: true, dataset_name: gsm8k, data_path: '{tmp}/none.jsonl'}}",
     "data.validation.data_path='{tmp}/none.jsonl': there is no such file or directory (looked for {tmp}/none.jsonl). "
     "Correct it."),
}
# fmt: on


@pytest.mark.parametrize(("override", "says"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_refused_before_weights(tiny_eval, no_weights, wrong, override, says):
    ended = tiny_eval(override.format(tmp=wrong))

    assert ended.code == 2, ended.err
    said = [line for line in ended.err.splitlines() if not line.startswith(("INFO ", "WARNING "))]
    assert said == ["Error: " + says.format(tmp=wrong, model=tiny_eval.model)]


def test_every_adapter_is_checked_before_the_first_is_evaluated(tiny_eval, no_weights, wrong, adapters):
    ended = tiny_eval(named(adapters[0], wrong / "of_wide", wrong / "none"))

    assert ended.code == 2
    said = [line.split(":")[0] for line in ended.err.splitlines() if "eval.adapters" in line]
    assert said == ["Error", f"eval.adapters='{wrong}/none'"]
    assert f"eval.adapters='{wrong}/of_wide': does not fit" in ended.err


# No key is ignored


def test_every_key_of_policy_and_eval_is_read(tiny_eval, adapters, monkeypatch):
    reads = Reads()
    configs = []

    def load_and_watch(*arguments):
        configs.append(load_config(*arguments))
        reads.watch(configs[-1])
        return configs[-1]

    monkeypatch.setattr(command, "load_config", load_and_watch)
    with reads.recording():
        ended = tiny_eval(named(adapters[0]))

    assert ended.code == 0, ended.err
    keys = {key for key, _ in flippable_leaves(configs[0]) if key.split(".")[0] in ("policy", "eval")}
    assert len(keys) > 15
    assert keys - reads.keys == set()
