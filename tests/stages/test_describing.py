"""The stage and its command, with a local chat endpoint and with the lab's model as an explainer."""

import json
import re

import pytest

from sae_persona.activations.lm import load_lm
from sae_persona.errors import ConfigError, RunError
from sae_persona.features.descriptions import Descriptions
from sae_persona.features.measure import MeasureConfig, Measurement
from sae_persona.lab import corpora
from sae_persona.runs import write_json
from sae_persona.stages import describing
from sae_persona.stages.pipeline import measure_stage


def proper(text):
    """What a model that keeps to the form says."""
    wanted = re.search(r"JSON list of (\d+) numbers", text)
    return json.dumps([1] * int(wanted[1])) if wanted else "Fires on: words"


def rarest(run, n):
    """Of the latents with enough contexts: there are texts on which these are silent."""
    found = Measurement.load(run)
    full = [i for i in range(found.stats.n_latents) if len(found.contexts.of(i)) == 8]
    return sorted(full, key=lambda i: int(found.stats.fired[i]))[:n]


def test_without_an_explainer_nobody_is_asked(call, small_run):
    code, out, err = call("describe", small_run.path, "--n-tokens", 4)
    assert code == 0, err
    assert "latent 0\n  promotes" in out and "4 more: " in out and "explained" not in err
    found = Descriptions.load(small_run)
    assert list(found) == list(range(24)) and all(len(found[i].promoted) == 4 for i in found)
    assert not small_run.explanations.exists()
    assert small_run.stage("describe")["latents"] == 24
    code, out, err = call("show", small_run.path, 3)
    assert code == 0 and "promotes" in out and "output score" in out
    assert json.loads(call("show", small_run.path, 3, "--json")[1])["description"]["latent"] == 3


def test_explains_with_an_endpoint_and_only_what_it_was_not_told(call, small_run, chat_stub):
    chat_stub.reply = proper
    asked = rarest(small_run, 2)
    flags = ("--explainer", f"openai:m@{chat_stub.url}", "--json")
    code, out, err = call("describe", small_run.path, *asked, *flags, "--dry-run")
    plan = json.loads(out)
    assert code == 0 and plan["latents"] == 2 and not chat_stub.bodies and not small_run.descriptions.exists()
    code, out, err = call("describe", small_run.path, *asked, *flags)
    assert code == 0, err
    assert len(chat_stub.bodies) == plan["requests"]
    assert f"2 of 2 latents explained, 0 with an error, {plan['requests']} requests" in err
    rows = json.loads(out)
    assert [row["latent"] for row in rows] == asked
    assert all((row["explanation"], row["detection"], row["fuzzing"]) == ("words", 0.5, 0.5) for row in rows)
    assert rows[0]["explainer"] == f"openai:m@{chat_stub.url}"
    assert len(small_run.explanations.read_text().splitlines()) == plan["requests"]

    code, again, err = call("describe", small_run.path, *asked, *flags)
    assert code == 0 and again == out and ", 0 requests" in err and len(chat_stub.bodies) == plan["requests"]

    other = next(i for i in range(24) if i not in asked)
    assert call("describe", small_run.path, other)[0] == call("describe", small_run.path, asked[0])[0] == 0
    found = Descriptions.load(small_run)
    assert set(found) == {*asked, other} and found[asked[0]].explanation == "words" and found[other].explanation is None


@pytest.mark.parametrize("reply", ["hmm", b"{", "<close>", "<hang>", 500], ids=str)
def test_an_explainer_that_fails_marks_the_latents_and_the_status_is_1(call, small_run, chat_stub, reply):
    chat_stub.reply = lambda text: reply
    flags = ("--timeout", 0.2, "--attempts", 2, "--backoff", 0, "--no-scores", "--top", 2)
    code, out, err = call("describe", small_run.path, "--explainer", f"openai:m@{chat_stub.url}", *flags)
    assert code == 1 and "0 of 2 latents explained, 2 with an error" in err and "Traceback" not in err
    found = Descriptions.load(small_run)
    assert len(found) == 2 and all(found[i].error and found[i].promoted and not found[i].explanation for i in found)
    assert "error: " in out


def test_one_latent_that_fails_is_marked_and_the_rest_is_done(call, small_run, chat_stub):
    first = []

    def reply(text):
        first.append(text)
        return 401 if text == first[0] else proper(text)

    chat_stub.reply = reply
    flags = ("--explainer", f"openai:m@{chat_stub.url}", "--concurrency", 1)
    code, _, err = call("describe", small_run.path, *rarest(small_run, 3), *flags)
    assert code == 0 and "2 of 3 latents explained, 1 with an error" in err
    errors = [each.error for each in Descriptions.load(small_run).values()]
    assert sum(error is not None for error in errors) == 1 and "status 401" in " ".join(filter(None, errors))


def test_the_lab_as_an_explainer_talks_rubbish_which_is_marked(call, small_run):
    flags = ("--explainer", "hf:lab", "--top", 1, "--answer-tokens", 8)
    code, _, err = call("describe", small_run.path, *flags)
    assert code == 1 and "0 of 1 latents explained, 1 with an error" in err
    (found,) = Descriptions.load(small_run).values()
    assert found.explainer == "hf:lab" and found.error


def test_which_latents_are_chosen(small_run):
    found = Measurement.load(small_run)

    def choose(*latents, **how):
        return describing.choose_latents(small_run, found, latents, **how)

    fired = found.stats.fired
    assert choose(top=3) == fired.argsort(descending=True, stable=True)[:3].tolist()
    assert choose(5, 2, 5) == [5, 2] and choose() == list(range(24))
    with pytest.raises(RunError, match="has no ranking for formal"):
        choose(persona="formal")
    for wrong in ({"latents": (1,), "top": 2}, {"latents": (), "top": 0}):
        with pytest.raises(ConfigError):
            choose(*wrong["latents"], top=wrong["top"])


def test_mistakes_are_told_before_anything_is_written(call, small_run):
    for wanted, arguments in {
        "latent 24 does not exist": (24,),
        "an explainer reads openai:MODEL@URL": ("--explainer", "gpt"),
        "give --explainer": ("--dry-run",),
        "a prompt needs a token": ("--prompt", ""),
    }.items():
        code, out, err = call("describe", small_run.path, *arguments)
        assert code == 2 and out == "" and wanted in err, err
    assert not small_run.descriptions.exists() and not small_run.has("describe")
    manifest = small_run.manifest
    write_json(small_run.path / "manifest.json", {**manifest, "stages": manifest["stages"][:1]})
    assert "has no measure stage yet" in call("describe", small_run.path)[2]


def test_new_measurements_make_old_descriptions_void(call, small_run):
    assert call("describe", small_run.path, 1)[0] == 0
    rows = list(corpora.labelled(8, "train", seed=1))
    measure_stage(small_run, load_lm("lab"), rows, config=MeasureConfig(context_size=128))
    assert not small_run.descriptions.exists()
