"""What a run found, in sentences; where the single latent falls short of a control, they say so."""

import math
from collections.abc import Sequence

from sae_persona.attribution.association import Interval
from sae_persona.attribution.ranking import RankedLatent, Ranking
from sae_persona.report.numbers import fixed, p_value, percent, points, strength, times
from sae_persona.steering.arms import Arm, Sweep


def find(swept: Sweep, kind: str) -> Arm | None:
    """The first test arm of a kind, if the sweep has one."""
    return next((arm for arm in swept.arms if arm.kind == kind and arm.part == "test"), None)


def largest_random(swept: Sweep) -> Arm | None:
    """The random latent that moves the rate most, either way."""
    known = [arm for arm in swept.randoms if math.isfinite(arm.gain.value)]
    return max(known, key=lambda arm: abs(arm.gain.value), default=None)


def moves(swept: Sweep) -> bool:
    """Whether the clamp raises the rate for certain (95 %), and by more than any random latent moves it."""
    random = largest_random(swept)
    gain = swept.chosen.gain
    return gain.low > 0 and (random is None or gain.value > abs(random.gain.value))


def falls_short(swept: Sweep) -> bool:
    """Whether the difference of means reaches a higher rate at the latent's cost."""
    dense = find(swept, "difference of means")
    return dense is not None and dense.rate.value > swept.chosen.rate.value


def headline(rankings: Sequence[Ranking], sweeps: Sequence[Sweep]) -> list[str]:
    """The result of the whole run, a sentence each."""
    if not sweeps:
        return [_ranked_only(rankings)] if rankings else []
    moved, short = [s for s in sweeps if moves(s)], [s for s in sweeps if falls_short(s)]
    if moved:
        said = [
            f"Clamping one latent raises the judged rate of {_count(moved, sweeps)}, "
            "and by more than any random latent of like firing rate moves it."
        ]
    else:
        said = ["Clamping one latent raises no judged rate both for certain and by more than random latents move it."]
    compared = [s for s in sweeps if find(s, "difference of means")]
    if short:
        said.append(f"It falls short of the difference of means at equal cost for {_count(short, compared)}.")
    elif compared:
        said.append("At equal cost the difference of means reaches no higher rate.")
    return said


def _count(some: Sequence[Sweep], every: Sequence[Sweep]) -> str:
    """How many, and which, of the personas; ``some`` is not empty."""
    if len(every) == 1:
        return some[0].persona
    if len(some) == len(every):
        return f"all {len(every)} personas"
    return f"{len(some)} of {len(every)} personas ({', '.join(s.persona for s in some)})"


def _ranked_only(rankings: Sequence[Ranking]) -> str:
    found = sum(ranking[0].p_max_t <= 0.05 for ranking in rankings if len(ranking))
    noun = "persona has" if len(rankings) == 1 else "personas have"
    return f"{found} of {len(rankings)} ranked {noun} a latent that tells them better than chance (max-T, 5 %)."


def about_ranking(ranking: Ranking, row: RankedLatent | None) -> list[str]:
    """How well the latent tells the persona, beside the dense directions."""
    if row is None:
        return []
    p = p_value(row.p_max_t, ranking.config["permutations"])
    told = "tells" if row.p_max_t <= 0.05 else "does not tell for certain"
    auroc = fixed(row.held_out_auroc.value)
    said = [f"Latent {row.latent} {told} the persona: AUROC {auroc} on held-out answers, p {p} (max-T)."]
    dense = next((base for base in ranking.dense if base.name == "difference of means"), None)
    own = _either_way(row.held_out_auroc.value)
    if dense and dense.held_out_auroc.value > own + 0.0005:
        doubt = ", though the intervals overlap" if _overlap(dense.held_out_auroc, row.held_out_auroc) else ""
        better = fixed(dense.held_out_auroc.value)
        said.append(f"As a detector it falls short of the difference of means ({better}){doubt}.")
    return said


def _overlap(one: Interval, other: Interval) -> bool:
    return one.low <= other.high and other.low <= one.high


def _either_way(auroc: float) -> float:
    """A latent that falls with the persona tells it as well as one that rises."""
    return max(auroc, 1 - auroc)


def about_sweep(swept: Sweep) -> list[str]:
    """What the clamp does, what it costs, and what does better."""
    base, chosen = find(swept, "baseline"), swept.chosen
    before = percent(base.rate.value) if base else "?"
    said = [
        f"Clamped to {strength(swept.strength)} its 99.9th percentile, it moves the judged rate from {before} to "
        f"{percent(chosen.rate.value)} at {times(chosen.cost.value)} the perplexity."
    ]
    if math.isnan(chosen.gain.low):
        said.append(f"So few questions ({chosen.n_questions}) do not tell whether that is chance.")
    elif chosen.gain.low <= 0:
        said.append("That gain's interval includes zero.")
    if chosen.cost.value > swept.config.get("max_cost", math.inf):
        said.append(f"That is more than the {strength(swept.config['max_cost'])} that a strength was meant to cost.")
    least = swept.config.get("min_valid", 0.0)
    if chosen.valid.value < least:
        said.append(f"Only {percent(chosen.valid.value)} of the answers are valid; {percent(least)} were meant to be.")
    return [*said, *_wrong_sign(swept), *_beside_random(swept), *_beside_dense(swept), *_beside_prompt(swept)]


def _wrong_sign(swept: Sweep) -> list[str]:
    wrong = find(swept, "wrong sign")
    if wrong is None or not math.isfinite(wrong.gain.value) or not wrong.gain.low > 0:
        return []
    return [f"With the wrong sign it raises the rate, too ({points(wrong.gain.value)} points)."]


def _beside_random(swept: Sweep) -> list[str]:
    random = largest_random(swept)
    if random is None:
        return []
    n, move = len(swept.randoms), random.gain.value
    if abs(move) >= swept.chosen.gain.value:
        return [f"A random latent moves it as much or more ({points(move)} points)."]
    most = round(100 * abs(move))
    moved = f"at most {most} point{'s'[: most != 1]}" if most else "less than 1 point"
    return [f"The {n} random latents move it by {moved}." if n > 1 else f"A random latent moves it by {moved}."]


def _beside_dense(swept: Sweep) -> list[str]:
    dense, chosen = find(swept, "difference of means"), swept.chosen
    if dense is None:
        return []
    rates = f"{percent(chosen.rate.value)} against {percent(dense.rate.value)}"
    doubt = ", though the intervals overlap" if _overlap(dense.rate, chosen.rate) else ""
    if math.isnan(dense.rate.low + chosen.rate.low):
        doubt = ", by too few questions to be certain"
    if dense.rate.value > chosen.rate.value:
        return [f"It falls short of the difference of means at equal cost: {rates}{doubt}."]
    if dense.rate.value == chosen.rate.value:
        return [f"It reaches what the difference of means does at equal cost: {rates}."]
    return [f"It does better than the difference of means at equal cost: {rates}{doubt}."]


def _beside_prompt(swept: Sweep) -> list[str]:
    prompt = find(swept, "prompt")
    if prompt is None:
        return []
    return [f"A prompt that asks for the persona gives {percent(prompt.rate.value)} at {times(prompt.cost.value)}."]
