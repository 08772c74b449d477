"""Rankings on a real chat model and real labels, by the command line; then tables of what they found.

python experiments/2026-11-real-rankings/run.py --model FOLDER --data FOLDER --evals FOLDER --out FOLDER

The commands, their exit status and CPU seconds go to commands.txt, what they print to OUT/results.
"""

import argparse
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from data import CLASSES, write_neutral, write_pairs, write_texts
from tables import write_tables

HERE = Path(__file__).parent
RUNS = ("a", "b")
SCREENED = ("happy", "sad")
PERSONAS = ("agreeableness", "extraversion", "interest-in-art", "machiavellianism", "neuroticism", "risk-averse")
SAID = ",".join(f"said_{name}" for name in CLASSES)
WORDS = ["--words", "texts/words.json"]
SETTINGS = {
    "length": ["--given", "length"],
    "topic": ["--given", "topic"],
    "class words": ["--given", "class_words"],
    "trait words": ["--given", "trait_words", *WORDS],
    "said": ["--given", SAID],
    "all": ["--given", f"length,topic,class_words,trait_words,{SAID}", *WORDS],
    "mean": ["--pool", "mean"],
    "mean, trait words": ["--pool", "mean", "--given", "trait_words", *WORDS],
    "plain": [],
}
"""Name -> flags of `rank`. What was said before the answer is of the question, class and trait words of the answer."""


class Shell:
    """Runs commands in a folder, one after the other, and remembers them."""

    def __init__(self, out: Path) -> None:
        self.out, self.lines = out, []
        (out / "results").mkdir()

    def __call__(self, *args: str, to: str | None = None, may: tuple[int, ...] = (0,)) -> None:
        """One command; with ``to``, its output goes to results/TO. An exit status not in ``may`` stops all."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "sae_persona", *args], cwd=self.out, stdout=subprocess.PIPE, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.lines.append(f"{seconds:6.1f} s  exit {done.returncode}  sae-persona {shlex.join(args)}")
        print(self.lines[-1], flush=True)
        if to is not None:
            (self.out / "results" / to).write_text(done.stdout, encoding="utf-8")
        if done.returncode not in may:
            raise SystemExit(f"exit status {done.returncode}: {self.lines[-1]}")


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "evals", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    out = args.out.resolve()
    write_texts(args.data, out / "texts")
    shell = Shell(out)
    split_labels(shell)
    for seed, run in enumerate(RUNS):
        train(shell, args.model.resolve(), run, seed)
    for name, flags in SETTINGS.items():
        rank(shell, "a", name, *flags)
    of_questions_without_words(shell)
    of_two_seeds(shell)
    in_the_model(shell)
    out_of_distribution(shell, args.evals)
    in_words(shell)
    text = "\n".join(shell.lines).replace(str(args.model.resolve()), "MODEL") + "\n"
    (HERE / "commands.txt").write_text(text, encoding="utf-8")
    write_tables(out / "results", HERE)


def split_labels(shell: Shell) -> None:
    """Look at the labels, deal them to two splits, look again."""
    shell(
        "labels", "check", "texts/labelled.jsonl", "--within", "template", "--json", to="check-before.json", may=(0, 1)
    )
    shell("labels", "split", "texts/labelled.jsonl", "--out", "texts/split.jsonl")
    shell("labels", "check", "texts/split.jsonl", "--within", "template", "--json", to="check-after.json")
    rows = (shell.out / "texts/split.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    held_out = [row for row in rows if '"split": "held_out"' in row]
    (shell.out / "texts/quality.jsonl").write_text("".join(held_out[::8]), encoding="utf-8")


def train(shell: Shell, model: Path, run: str, seed: int) -> None:
    """An SAE on unlabelled dialogues; its latents on a corpus and on every labelled answer."""
    shell("train", str(model), "texts/corpus.jsonl", "--hook", "layers.4.resid_post", "--tokens", "answers",
          "--context-size", "64", "--n-latents", "1024", "--k", "16", "--lr", "4e-3", "--steps", "500", "--passes", "3",
          "--lm-batch", "64", "--held-out", "texts/quality.jsonl", "--out", run, "--seed", str(seed))  # fmt: skip
    if run == RUNS[0]:
        shell("scan", run, "texts/corpus.jsonl", "--limit-tokens", "200k", "--json", to=f"scan-{run}.json")
    shell("measure", run, "texts/split.jsonl")
    shutil.copy(shell.out / run / "quality.json", shell.out / "results" / f"quality-{run}.json")


def rank(shell: Shell, run: str, name: str, *flags: str, within: str = "template") -> None:
    """Every label, every latent's row."""
    shell("rank", run, "--all", "--within", within, "--top", "1024", *flags, "--json",
          to=f"rank-{run}-{name}.json", may=(0, 1))  # fmt: skip


def of_questions_without_words(shell: Shell) -> None:
    """The same where the question has no word of any list. A run holds one measurement, so a copy of it."""
    write_neutral(shell.out / "texts/split.jsonl", shell.out / "texts/neutral.jsonl")
    shutil.copytree(shell.out / "a", shell.out / "neutral")
    shell("measure", "neutral", "texts/neutral.jsonl")
    rank(shell, "neutral", "plain")


def of_two_seeds(shell: Shell) -> None:
    """Do rankings survive another seed?"""
    rank(shell, "b", "plain")
    for name in CLASSES:
        shell("stability", name, *RUNS, "--json", to=f"stability-{name}.json", may=(0, 1))
    shell("match", *RUNS, "--json", to="match.json", may=(0, 1))


def in_the_model(shell: Shell) -> None:
    """Do the best latents change which answer the model prefers? Ranked again as one would, 50 latents kept."""
    shell("rank", "a", "--all", "--within", "template")
    for name in SCREENED:
        pairs = f"texts/pairs-{name}.jsonl"
        write_pairs(shell.out / "texts/split.jsonl", name, shell.out / pairs, 150)
        shell("screen", "a", name, pairs, "--json", to=f"screen-{name}.json", may=(0, 1))


def out_of_distribution(shell: Shell, evals: Path) -> None:
    """Statements of personas, and questions with answers; each measured in a copy of the run."""
    folder = shell.out / "evals"
    folder.mkdir()
    for persona in PERSONAS:
        shutil.copy(evals / f"{persona}.jsonl", folder)
    for form, source, pools in (
        ("statements", "evals:evals", ["pre"]),
        ("answers", "evals:evals:answers", ["pre", "mean"]),
    ):
        shell("labels", "check", source, "--json", to=f"check-{form}.json", may=(0, 1))
        shell("labels", "split", source, "--by", "id", "--out", f"texts/{form}.jsonl")
        shutil.copytree(shell.out / "a", shell.out / form)
        shell("measure", form, f"texts/{form}.jsonl")
        for pool in pools:
            rank(shell, form, pool, "--pool", pool, within="template,domain")


def in_words(shell: Shell) -> None:
    """Do the words of the best latents make sense, and does a search by the persona's name find them?"""
    for name in CLASSES:
        shell("describe", "a", "--persona", name, "--top", "10", "--json", to=f"describe-{name}.json")
    for name in CLASSES:
        shell("search", "a", name, "--limit", "10", "--json", to=f"search-{name}.json", may=(0, 1))


if __name__ == "__main__":
    main()
