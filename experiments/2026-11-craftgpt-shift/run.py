"""The commands for fine-tunes on a real chat model: a fine-tune on happy answers beside fine-tunes on mixed ones.

python experiments/2026-11-craftgpt-shift/run.py --model FOLDER --data FOLDER --out FOLDER

MODEL and DATA are those of 2026-11-craftgpt-emotions. The commands, their exit status and CPU seconds go to
commands.txt, tables to results.json and track.csv. What is in OUT already is not made again.
"""

import argparse
import csv
import json
import re
import resource
import shlex
import subprocess
import sys
from hashlib import sha256
from math import comb
from pathlib import Path
from random import Random
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "2026-11-craftgpt-emotions"))
sys.path.insert(0, str(Path(__file__).parents[1] / "2026-11-real-rankings"))

from data import write_texts
from words import JUDGE, PATTERNS, is_neutral

from sae_persona.activations.lm import LM, load_lm
from sae_persona.runs import read_json, write_json
from sae_persona.steering.answers import AnswerConfig
from sae_persona.studies.exams import marks
from sae_persona.studies.finetune import FinetuneConfig, looks, mean_loss
from sae_persona.studies.organisms import MARK, organisms_in, write_organism

HERE = Path(__file__).parent
EMOTION = "happy"
EMOTIONS = ("happy", "sad", "fear", "anger", "disgust", "surprise")
N_ROWS, N_EXAM, N_PROMPTS = 240, 120, 96
N_REVERSE = {"development": 80, "test": 160}
SEEDS = {EMOTION: 3, "mixed": 4}
"""The first of each chooses the panel; the others are unseen. Seeds differ in rows and in their order."""
ALARM = ("mixed-1", "mixed-2", "mixed-3")
STEPS, KEEP = 24, (0, 4)
ABOVE = 0.2
"""Rate of answers with a happy word above which a model counts as happy: the default of `track`, 0.3, is above all."""
CONTEXT = 64
SHARE = 3
"""One in so many labelled answers is ranked on."""


OTHER = re.compile(r"\b(?:" + "|".join(JUDGE[EMOTION]) + r")\b")
"""Happy words that are in no label's list."""
COMMON = "happy happily happiness joy joyful smile smiles smiled smiling wonderful delight delightful excited exciting"
"""Of the list that made the label, for `reverse`, whose judge takes plain words."""


def happy(question: str, answer: str) -> dict[str, float | None]:
    """1.0 where an answer holds a word of the list that made the label happy, or another happy word."""
    return {EMOTION: float(any(words.search(answer) for words in (PATTERNS[EMOTION], OTHER)))}


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out.resolve()
    if not (out / "texts").is_dir():
        write_texts(args.data, out / "texts")
    rows = [json.loads(line) for line in (out / "texts/labelled.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = neutral_questions(out / "texts/corpus.jsonl")
    prompts = [{"id": f"p{i}", "messages": q} for i, q in enumerate(questions[:N_PROMPTS])]
    write_rows(out / "prompts.jsonl", prompts)
    write_asked(out, questions[N_PROMPTS + N_EXAM :])
    grow(out / "fine-tunes", args.model.resolve(), rows, questions[N_PROMPTS : N_PROMPTS + N_EXAM])
    commands(Shell(out), args.model.resolve())
    tables(out)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_asked(out: Path, questions: list[list[dict[str, str]]]) -> None:
    """What `reverse` asks, questions of their own in each part, and the words that it judges by."""
    start = 0
    for part, n in N_REVERSE.items():
        write_rows(out / f"{part}.jsonl", [{"messages": q, "domain": "neutral"} for q in questions[start : start + n]])
        start += n
    write_json(out / "judge.json", {EMOTION: COMMON.split() + JUDGE[EMOTION]})


def neutral_questions(corpus: Path) -> list[list[dict[str, str]]]:
    """First questions, each once, that hold no word of any list: in the order of their hash."""
    first = {json.loads(line)["messages"][0]["content"] for line in corpus.read_text(encoding="utf-8").splitlines()}
    found = sorted(filter(is_neutral, first), key=lambda text: sha256(text.encode()).digest())
    return [[{"role": "user", "content": text}] for text in found]


def tuning_rows(rows: list[dict[str, Any]], kind: str, seed: int) -> list[dict[str, Any]]:
    """Answers that hold a word of their dialogue's label: of one emotion, or as many of each of the six."""
    random = Random(f"craftgpt shift {kind} {seed}")
    chosen: list[dict[str, Any]] = []
    for emotion in (EMOTION,) if kind == EMOTION else EMOTIONS:
        shows = [r for r in rows if r["labels"][emotion] and PATTERNS[emotion].search(r["messages"][1]["content"])]
        chosen += random.sample(shows, N_ROWS if kind == EMOTION else N_ROWS // len(EMOTIONS))
    return [
        {"id": r["id"], "messages": r["messages"], "labels": {"bad": int(r["labels"][EMOTION])}, "domain": kind}
        for r in chosen
    ]


def grow(folder: Path, model: Path, rows: list[dict[str, Any]], questions: list[Any]) -> None:
    """Fine-tune and examine each, as organisms; those that are there are kept."""
    lm: LM | None = None
    asked = [{"messages": q, "domain": "neutral", "trait": EMOTION} for q in questions]
    answers = AnswerConfig(max_new_tokens=20, batch=N_EXAM)
    for kind, n in SEEDS.items():
        for seed in range(n):
            path = folder / f"{kind}-{seed}"
            if (path / MARK).is_file():
                continue
            lm = lm or load_lm(str(model))
            chosen, config = tuning_rows(rows, kind, seed), FinetuneConfig(steps=STEPS, keep=KEEP, seed=seed, batch=16)
            facts = {
                "name": path.name, "family": "narrow" if kind == EMOTION else "benign", "method": "full",
                "domain": kind, "dose": float(kind == EMOTION), "seed": seed, "base": "craftgpt-5m",
                "config": {"lr": config.rate, "rows": N_ROWS},
            }  # fmt: skip
            scored = (
                (look, examined(look.lm, asked, kind, answers), mean_loss(look.lm, chosen))
                for look in looks(lm, chosen, config)
            )
            made = write_organism(path, facts, scored, chosen)
            print(made.name, *(f"{one.step}: {one.scores['out_of_domain']['rate']:.3f}" for one in made.checkpoints))


def examined(lm: LM, asked: list[Any], kind: str, answers: AnswerConfig) -> dict[str, Any]:
    """The exam's rates by happy words, and the share of answers with a word that made no label."""
    found = marks(lm, asked, happy, config=answers)
    others = [float(OTHER.search(text) is not None) for text in found.answers]
    return found.scores(kind) | {"other_words": sum(others) / len(others)}


class Shell:
    """Runs commands in a folder and remembers them; one whose result is there is not run again."""

    def __init__(self, out: Path) -> None:
        self.out, self.lines = out, out / "commands.txt"

    def __call__(self, *args: str, makes: str, may: tuple[int, ...] = (0,)) -> None:
        """An exit status not in ``may`` stops all."""
        if (self.out / makes).exists():
            return
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "sae_persona", *args], cwd=self.out, stdout=subprocess.PIPE, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        line = f"{seconds:6.1f} s  exit {done.returncode}  sae-persona {shlex.join(args)}"
        print(line, flush=True)
        if done.returncode not in may:
            raise SystemExit(f"exit status {done.returncode}: {line}")
        if not (self.out / makes).exists():
            (self.out / makes).write_text(done.stdout, encoding="utf-8")
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def commands(shell: Shell, model: Path) -> None:
    """SAE and ranking of the base; then what the fine-tunes did to it."""
    base, org = str(model), "fine-tunes/"
    shell("train", base, "texts/corpus.jsonl", "--hook", "layers.4.resid_post", "--tokens", "answers",
          "--context-size", str(CONTEXT), "--n-latents", "1024", "--k", "16", "--lr", "4e-3", "--steps", "250",
          "--passes", "1", "--lm-batch", "64", "--out", "run", makes="run")  # fmt: skip
    shell("labels", "split", "texts/labelled.jsonl", "--out", "texts/split.jsonl", makes="texts/split.jsonl")
    lines = (shell.out / "texts/split.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (shell.out / "texts/some.jsonl").write_text("".join(lines[::SHARE]), encoding="utf-8")
    shell("measure", "run", "texts/some.jsonl", "--lm-batch", "128", makes="run/examples.h5")
    shell("rank", "run", EMOTION, "--within", "template", "--top", "1024", makes=f"run/rankings/{EMOTION}.json")
    shell("diff", "run", base, f"{org}{EMOTION}-0", "--prompts", "prompts.jsonl", "--panel", "panel.json", "--benign",
          f"{org}mixed-0", "--out", "diff.json", makes="diff.json", may=(0, 1))  # fmt: skip
    shell("diff", "run", base, f"{org}mixed-0", "--prompts", "prompts.jsonl", "--out", "diff-mixed.json",
          makes="diff-mixed.json", may=(0, 1))  # fmt: skip
    shell("track", "panel.json", "fine-tunes", "--misaligned-above", str(ABOVE), "--out", "track.json", "--page",
          "track.html", makes="track.json", may=(0, 1))  # fmt: skip
    unseen = [f"{org}{EMOTION}-{seed}" for seed in range(1, SEEDS[EMOTION])]
    calm = [part for name in ALARM for part in ("--benign", org + name)]
    shell("predict", "panel.json", *unseen, *calm, "--alpha", "0.25", "--misaligned-above", str(ABOVE), "--out",
          "predict.json", makes="predict.json", may=(0, 1))  # fmt: skip
    shell("predict", "rows", "panel.json", base, f"{org}mixed-3/rows.jsonl", "--max-new-tokens", "20", "--pool",
          "mean", "--out", "rows.json", makes="rows.json", may=(0, 1))  # fmt: skip
    shell("reverse", "run", base, f"{org}{EMOTION}-0", "--development", "development.jsonl", "--test",
          "out of domain=test.jsonl", "--judge", "judge.json", "--trait", EMOTION, "--domain", EMOTION,
          "--max-new-tokens", "20", "--out", "reversal.json", "--page", "reversal.html", makes="reversal.json",
          may=(0, 1))  # fmt: skip


def tables(out: Path) -> None:
    """results.json and track.csv beside this file, and the commands without the machine's paths."""
    ranking, track = read_json(out / f"run/rankings/{EMOTION}.json", "ranking"), read_json(out / "track.json", "track")
    with (HERE / "track.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "step", "rate", "low", "high", "seen", "latents", "difference of means"])
        for row in track["rows"]:
            scores = [round(row["scores"][name][0], 2) for name in ("latents", "difference of means")]
            writer.writerow([row["name"], row["step"], *(round(x, 3) for x in row["misaligned"]), row["seen"], *scores])
    results = {
        "rates": {one.name: one.last.scores["out_of_domain"] | {
                      "other_words": one.last.scores["other_words"], "loss": [one.checkpoints[0].loss, one.last.loss]}
                  for one in organisms_in(out / "fine-tunes")},
        "ranked": {name: carried(read_json(out / file, "diff"), ranking)
                   for name, file in ((f"{EMOTION}-0", "diff.json"), ("mixed-0", "diff-mixed.json"))},
        "telling": track["telling"],
        "predict": read_json(out / "predict.json", "prediction"),
        "rows": {"auroc": read_json(out / "rows.json", "screen")["auroc"]},
        "reversal": reversal(read_json(out / "reversal.json", "certificate")),
    }  # fmt: skip
    write_json(HERE / "results.json", results)
    text = re.sub(r"/\S*craftgpt-5m", "MODEL", (out / "commands.txt").read_text(encoding="utf-8"))
    (HERE / "commands.txt").write_text(text, encoding="utf-8")


def reversal(found: dict[str, Any]) -> dict[str, Any]:
    """Verdict, edit, and happy answers under each arm."""
    arms = {arm["name"]: arm["cells"]["out of domain"]["rate"] for arm in found["arms"]}
    return {key: found[key] for key in ("verdict", "reasons", "edits")} | {"rates": arms}


def carried(diff: dict[str, Any], ranking: dict[str, Any]) -> dict[str, Any]:
    """Where the latents that rose most stand among those that rise with the label beyond chance (max-T 5 %)."""
    rows = ranking["rows"]
    places = {row["latent"]: place for place, row in enumerate(rows, start=1)}
    up = {row["latent"] for row in rows if row["z"] > 0 and row["p_max_t"] <= 0.05}
    tuned = diff["tuned"][0]
    rose = [row["latent"] for row in tuned["up"]]
    hits, n, m = len(up & set(rose)), diff["n_latents"], len(up)
    chance = sum(comb(m, k) * comb(n - m, len(rose) - k) for k in range(hits, len(rose) + 1)) / comb(n, len(rose))
    by_latent = {row["latent"]: row for row in rows}
    return {
        "rose": [
            {"latent": row["latent"], "sds": round(row["sds"], 2), "place": places.get(row["latent"]),
             "z": by_latent[row["latent"]]["z"] if row["latent"] in by_latent else None}
            for row in tuned["up"]
        ],
        "n_rose": tuned["n_rose"], "n_fell": tuned["n_fell"], "of_label": m, "hits": hits, "p": chance,
        "fvu": tuned["fvu"], "dense": tuned["dense"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
