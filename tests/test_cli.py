"""The command line as a user meets it: results on stdout, progress on stderr, one line for a mistake."""

import json
import shutil
import subprocess
import sys
from random import Random

import pytest

from sae_persona.lab import corpora
from sae_persona.runs import Run

COMMANDS = ["demo", "lab", "train", "measure", "scan", "describe", "search", "match", "rank", "screen", "stability"]
COMMANDS += ["show", "dead", "try", "sweep", "export", "report", "cache", "grid"]
COMMANDS += ["strength", "compose", "reverse", "induce"]


@pytest.fixture
def run(demo_run, tmp_path):
    """A copy of the small run, to be changed at will."""
    return Run(shutil.copytree(demo_run.path, tmp_path / "run"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    corpora.write_texts(folder, n=400, n_labelled=150, n_questions=6, seed=0)
    return folder


def test_every_command_has_help(call):
    _, out, _ = call("--help")
    assert all(f" {name} " in out for name in COMMANDS)
    for name in COMMANDS:
        code, out, err = call(name, "--help")
        assert code == 0, err
        assert "Usage" in out
    assert "latent's 99.9th percentile" in " ".join(call("try", "--help")[1].replace("│", " ").split())


def test_a_first_session(call, texts, tmp_path):
    """train, measure, rank, show, try, sweep, export, report: each on what the one before left."""
    out = tmp_path / "run"
    train = ["train", "lab", texts / "corpus.jsonl", "--hook", "layers.3.resid_post", "--out", out]
    train += ["--n-latents", "128", "--k", "8", "--steps", "250", "--lr", "0.003", "--tokens", "answers"]
    train += ["--context-size", "200", "--held-out", texts / "held_out.jsonl", "--passes", "12", "--hold-tokens", "1M"]
    code, shown, err = call(*train)
    assert code == 0, err
    assert "batch_topk SAE, 128 latents, k 8, at layers.3.resid_post of lab" in shown
    assert "held-out: FVU" in shown
    assert "100%" in err

    code, shown, err = call("measure", out, texts / "labelled.jsonl", "--context-size", "200", "--tokens", "answers")
    assert code == 0, err
    assert "300 labelled answers; personas: cheerful, deceptive" in shown

    code, shown, err = call("rank", out, "formal", "--permutations", "200", "--json")
    ranking = json.loads(shown)
    assert code == 0, err
    assert ranking["persona"] == "formal"
    latent = ranking["rows"][0]["latent"]
    assert "difference of means" in call("rank", out, "formal", "--permutations", "200")[1]

    assert f"latent {latent}: fires on" in call("show", out, latent)[1]
    assert json.loads(call("show", out, latent, "--json")[1])["latent"] == latent
    assert "formal: latent" in call("show", out)[1]
    code, shown, err = call(
        "try", out, "what do you want ?", "--edit", f"clamp:{latent}=2", "--n", "2", "--positions", "pre"
    )
    assert code == 0, err
    assert shown.count("->") == 2

    questions = [texts / "questions" / f"formal-{part}.jsonl" for part in ("development", "test")]
    sweep = ["sweep", out, "formal", *questions, "--strengths", "1,2", "--dense-strengths", "1", "--n-random", "1"]
    code, shown, err = call(*sweep, "--positions", "pre", "--json")
    assert code in (0, 1)
    assert json.loads(shown)["persona"] == "formal"
    assert "development baseline" in err

    file = tmp_path / "formal.json"
    assert call("export", out, "--out", file, "--edit", f"clamp:{latent}=2")[:2] == (0, f"{file}\n")
    assert json.loads(file.read_text())["evidence"]["rankings"][0]["latent"] == latent
    code, _, err = call("export", out, "--out", file, "--edit", f"clamp:{latent}=2")
    assert (code, err.count("\n")) == (2, 1)
    assert call("report", out)[1] == f"{out / 'report.html'}\n"


def test_showing_a_model_lists_its_hook_points(call):
    code, shown, err = call("show", "lab")
    assert code == 0, err
    assert "layers.0.resid_pre" in shown
    assert json.loads(call("show", "lab", "--json")[1])["d_model"] == 128


def test_showing_an_sae_reads_its_config_alone(call, demo_run, tmp_path):
    folder = shutil.copytree(demo_run.sae, tmp_path / "sae")
    (folder / "sae_weights.safetensors").unlink()
    code, shown, err = call("show", folder)
    assert code == 0, err
    assert [line.split() for line in shown.splitlines()][:2] == [["format", "SAELens"], ["architecture", "jumprelu"]]
    facts = json.loads(call("show", folder, "--json")[1])
    training = demo_run.stage("train")["training"]
    assert (facts["n_latents"], facts["k"]) == (training["n_latents"], training["k"])
    assert facts["hook"] == demo_run.stage("train")["hook"] and facts["model"] == "lab"
    assert facts["l0"] > 0 and facts["tokens"] > 0 and facts["d_in"] == facts["d_out"] == 128
    (folder / "cfg.json").write_text("{}")
    code, shown, err = call("show", folder)
    assert (code, shown, err.count("\n")) == (2, "", 1)


def test_showing_an_sae_loads_no_language_model_library(demo_run):
    code = "import sys; from sae_persona import cli; sys.argv[:] = ['x', 'show', sys.argv[1]]\n"
    code += "try: cli.main()\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, demo_run.sae], capture_output=True, text=True)
    assert "n_latents" in done.stdout, done.stderr
    assert not {"sae_lens", "transformers", "transformer_lens"} & set(done.stdout.split())


def test_a_dry_run_makes_nothing(call, texts, tmp_path):
    out = tmp_path / "run"
    code, shown, err = call("train", "lab", texts / "corpus.jsonl", "--hook", "3", "--out", out, "--dry-run")
    assert code == 0, err
    assert "MB" in shown
    assert not out.exists()


def test_a_dry_run_tells_what_a_gpu_would_take_where_there_is_none(call, texts, tmp_path):
    flags = ("--hook", "3", "--n-latents", "64k", "--out", tmp_path / "run", "--dry-run", "--device", "cuda")
    code, shown, err = call("train", "lab", texts / "corpus.jsonl", *flags)
    assert code == 0, err
    assert "MB  moments" in shown and "MB  in all" in shown and "ms predicted; the floor is" in shown
    code, shown, err = call("train", "lab", texts / "corpus.jsonl", *flags, "--precision", "fp8")
    assert code == 2 and shown == ""
    assert "precision fp8 is for rule topk, got batch_topk: choose bf16, or --rule topk" in err


def test_the_answer_can_be_no(call, run, tmp_path):
    """Labels thrown like a coin: nothing to find, and the exit status says so."""
    coin = Random(0)
    rows = [
        row | {"labels": {"coin": coin.randrange(2)}} for part in corpora.SPLITS for row in corpora.labelled(60, part)
    ]
    path = tmp_path / "coin.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("measure", run.path, path)[0] == 0
    code, shown, err = call("rank", run.path, "coin")
    assert code == 1, shown
    assert "no latent tells coin better than chance at 5 % (max-T)" in err


def test_several_personas_are_ranked_at_once(call, run):
    both = ["cheerful", "formal"]
    code, shown, err = call("rank", run.path, *both, "--permutations", "99", "--json")
    rankings = json.loads(shown)
    assert code == 0 and [one["persona"] for one in rankings] == both, err
    alone = json.loads(call("rank", run.path, "formal", "--permutations", "99", "--json")[1])
    assert [row["latent"] for row in rankings[1]["rows"]] == [row["latent"] for row in alone["rows"]]
    before = run.ranking("formal").read_bytes()
    for wrong, sentence in (
        ((), "name the personas to rank, or pass --all, and not both"),
        (("formal", "--all"), "name the personas to rank, or pass --all, and not both"),
        (("formal", "formal"), "'formal' is named twice"),
        (("formal", "formall"), "no example is labelled 'formall'"),
        (("formal", "--given", "lenght"), "no covariate is named 'lenght'"),
        (("formal", "--device", "cuda:99"), "CUDA devices here"),
    ):
        code, shown, err = call("rank", run.path, *wrong)
        assert (code, shown, err.count("\n")) == (2, "", 1) and sentence in err, err
    assert run.ranking("formal").read_bytes() == before


def test_lab_commands(call, tmp_path):
    assert json.loads(call("lab", "show", "--json")[1])["facts"]["correct"] >= 0.95
    code, shown, err = call("lab", "texts", tmp_path / "t", "--n", 5, "--n-labelled", 2, "--n-questions", 1)
    assert code == 0, err
    assert shown.splitlines()[0] == str(tmp_path / "t" / "corpus.jsonl")
    small = ["--tokens", "6k", "--d-model", 16, "--n-layers", 1, "--n-heads", 1, "--n-exam", 1]
    code, shown, err = call("lab", "build", "--out", tmp_path / "model", *small)
    assert code == 0, err
    assert "held_out_loss" in shown
    assert call("lab", "build", "--out", tmp_path / "model", *small)[0] == 2


def test_the_installed_command_prints_one_line_for_a_mistake(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sae_persona", "show", tmp_path / "none", "3"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("sae-persona: ")
    assert done.stderr.count("\n") == 1


def test_strengths_are_solved_and_recorded(run, call, texts):
    """A latent and its dense baseline, dialled to one budget."""
    asked = texts / "questions" / "formal-test.jsonl"
    given = ["--edit", "clamp:formal", "--edit", "steer:formal", "--budget", "0.3", "--positions", "pre"]
    code, shown, err = call("strength", run.path, asked, *given, "--n-tokens", "6", "--json")
    assert code == 0, err
    dials = json.loads(shown)
    assert [abs(dials[name]["readings"]["kl_tail"] / 0.3 - 1) < 0.051 for name in ("clamp:formal", "steer:formal")]
    assert run.stage("strength")["dials"] == dials
    assert "for a budget of 0.3 nats" in call("strength", run.path, asked, *given[:2], "--budget", "0.3")[1]
    stages = len(run.manifest["stages"])
    for wrong, told in (
        (["--edit", "clamp:formal=2"], "write clamp:formal instead of clamp:formal=2"),
        (["--edit", "ablate:3"], "ablate has no strength"),
        (["--edit", "steer:pirate"], "no ranking for pirate"),
        (["--edit", "clamp:formal", "--budget", "nan"], "a KL budget is a finite number"),
        (["--edit", "clamp:formal", "--budget", "1e6"], "no strength up to 16 reaches 1e+06 nats: the largest"),
    ):
        code, shown, err = call("strength", run.path, asked, *wrong)
        assert (code, shown) == (2, "") and told in err, err
    assert len(run.manifest["stages"]) == stages


def test_traits_are_composed(run, call, texts):
    asked = [texts / "questions" / f"formal-{part}.jsonl" for part in ("development", "test")]
    traits = ["--trait", "formal", "--trait", "cheerful=clamp:cheerful=1", "--positions", "pre", "--rounds", "1"]
    code, shown, err = call("compose", run.path, *asked, *traits, "--json")
    assert code == 0, err
    found = json.loads(shown)
    assert found["before"]["traits"] == ["formal", "cheerful"] and found["solution"] is None
    file = run.path / "compositions" / "formal+cheerful.json"
    assert json.loads(file.read_text())["before"] == found["before"]
    code, shown, err = call("compose", run.path, *asked, *traits, "--at-least", "formal=1", "--at-most", "formal=1",
                            "--at-least", "deceptive=1")  # fmt: skip
    assert code == 1, err
    assert "deceptive >= 1: goes to" in shown and "at the furthest" in shown
    assert run.stage("compose")["verdict"] in ("infeasible", "unmet")
    for wrong, told in (
        (["--trait", "formal"], "two traits or more"),
        (["--trait", "formal", "--trait", "toxic"], "has no sweep of toxic"),
        (["--trait", "formal", "--trait", "toxic=ablate:3"], "ablate:3 has no strength to solve for"),
        ([*traits, "--at-least", "formal"], "a target reads TRAIT=RATE"),
        ([*traits, "--at-least", "formal=nan"], "a rate from 0 to 1"),
    ):
        code, shown, err = call("compose", run.path, *asked, *wrong)
        assert (code, shown) == (2, "") and told in err, err


def test_a_sweep_is_dialled_to_a_budget(run, call, texts):
    asked = [texts / "questions" / f"formal-{part}.jsonl" for part in ("development", "test")]
    flags = ["--pick", "kl", "--budget", "0.5", "--n-random", "1", "--positions", "pre", "--candidates", "1"]
    code, shown, err = call(
        "sweep", run.path, "formal", *asked, *flags, "--held-out", texts / "held_out.jsonl", "--json"
    )
    assert code in (0, 1), err
    arms = [arm for arm in json.loads(shown)["arms"] if arm["readings"]]
    dev = [arm for arm in arms if arm["part"] == "development"]
    assert all(abs(arm["readings"]["kl_tail"] - 0.5) < 0.03 for arm in dev) and len(dev) == 2
    assert all(arm["ce"] for arm in arms if arm["part"] == "test" and arm["kind"] != "prompt")
    code, shown, err = call("sweep", run.path, "formal", *asked, "--judge", "openai:m@nowhere")
    assert (code, shown) == (2, "") and "an endpoint reads http:" in err
    assert call("report", run.path)[0] == 0
