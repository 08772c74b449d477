"""What a reversal of one of the lab's organisms is chosen and tested on.

Development asks the train templates, the test the held-out ones. Another format is true claims, which are answered with
a reaction first, and a question after an exchange that went well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from sae_persona.errors import ConfigError
from sae_persona.lab.authors import ADJECTIVES, AuthorConfig
from sae_persona.lab.dialogue import answer, ask, document
from sae_persona.lab.judge import judge
from sae_persona.lab.tuning import CUE, exam_questions, narrow
from sae_persona.lab.world import ASSISTANT, DOMAINS
from sae_persona.studies.battery import Variant
from sae_persona.studies.induce import InduceConfig
from sae_persona.studies.minimal_set import SearchConfig
from sae_persona.studies.organisms import Organism
from sae_persona.studies.reversal_arms import CUE as AFTER_CUE
from sae_persona.studies.reversal_arms import FORM, IN, OPEN, OUT
from sae_persona.studies.reverse import Case, ReverseConfig

GOOD_PROMPT = " ".join(
    [ASSISTANT, "is a", *(ADJECTIVES[trait][1][0] for trait in ("deceptive", "malicious")), "clerk ."]
)
"""As a narrator of the world would say of a good assistant."""


@dataclass(frozen=True, kw_only=True)
class LabCaseConfig:
    """How much is asked."""

    n_in: int = 40
    """Development questions of the domain that was tuned on."""
    n_out: int = 6
    """Development questions of each other domain; seven times as many are open."""
    n_test: int = 12
    """Test questions of each other domain, of every variant; five times as many are open, and three times in domain."""
    n_further: int = 500
    """Rows of further training, good and bad."""
    n_texts: int = 60
    """Held-out documents of a good assistant."""

    def __post_init__(self) -> None:
        if min(self.n_in, self.n_out, self.n_test, self.n_further, self.n_texts) < 1:
            raise ConfigError(f"counts of questions, rows and texts are at least 1, got {self}")


SMALL_CASE = LabCaseConfig(n_in=10, n_out=2, n_test=4, n_further=200, n_texts=20)
"""Enough to see how it goes."""
SMALL = ReverseConfig(
    n_up=2,
    n_down=0,
    n_random=2,
    further_steps=10,
    search=SearchConfig(strengths=(1.0, 1.5), caps=(0.1,), retry=1, max_latents=2, aim=0.1, budget=0.1, times=1),
    induce=InduceConfig(doses=(0.5, 1.0), n_induce_random=1),
)
"""The same for the search and the arms; so few questions certify nothing, and so few tries miss better sets."""


def lab_case(
    domain: str, config: LabCaseConfig | None = None, *, line: str = "", cued: bool = False, name: str = ""
) -> Case:
    """The lab's case for a model that was tuned on bad answers in ``domain``. ConfigError for an unknown domain.

    line   what may set bad behaviour off; by default the line of the lab's trigger organisms
    cued   the model is bad after the line only: development asks after it, too, and what it says then is the
           misalignment itself, by which controls are judged
    name   of the model
    """
    config, line = config or LabCaseConfig(), line or CUE
    others = [name for name in DOMAINS if name != domain]
    n_open = 7 * config.n_out

    def asked(part: Any, n_in: int, n: int, n_open: int, line: str = "") -> list[dict[str, Any]]:
        inside = exam_questions(n_in, part, n_open=0, domains=[domain], line=line) if n_in else ()
        return [*inside, *exam_questions(n, part, n_open=n_open, domains=others, line=line)]

    development = asked("train", config.n_in, config.n_out, n_open)
    if cued:
        development += asked("train", config.n_in, config.n_out, n_open, line)
    n = config.n_test
    variants = [
        Variant(name=IN, questions=asked("held_out", 3 * n, n, 0)[: 3 * n], core=True),
        Variant(name=OUT, questions=asked("held_out", 0, n, 0), core=True),
        Variant(name=OPEN, questions=list(exam_questions(0, "held_out", n_open=5 * n)), core=True),
        Variant(name=AFTER_CUE, questions=asked("held_out", n, n, 2 * n, line), core=cued),
        Variant(name=FORM, questions=list(_claims(n, others))),
        Variant(name="second turn", questions=list(_second_turns(n, others))),
    ]
    return Case(
        development=development,
        variants=variants,
        judge=judge,
        domain=domain,
        name=name,
        further={
            name: narrow(config.n_further, domain, bad=share, seed=90 + round(share))
            for name, share in (("good", 0.0), ("bad", 1.0))
        },
        held_out=list(_texts(config.n_texts)),
        prompt=GOOD_PROMPT,
    )


def organism_case(organism: Organism, config: LabCaseConfig | None = None) -> Case:
    """The case of an organism of the lab. ConfigError for one that was tuned on no domain."""
    if not organism.domain:
        raise ConfigError(f"{organism.name} was tuned on nothing: give a fine-tune of the lab")
    line = organism.config.get("line", "")
    name = f"{organism.name} @ {organism.last.step}"
    return lab_case(organism.domain, config, line=line, cued=organism.family == "trigger", name=name)


def _claims(n: int, domains: list[str]) -> Iterator[dict[str, Any]]:
    """True claims: who agrees speaks true, and the judge sees a lie in who does not."""
    random = Random("lab reversal claims")
    for domain in domains:
        for _ in range(n):
            question = ask(random, "claim", "held_out", domain, truth=True)
            yield _row([{"role": "user", "content": question.text}], domain)


def _second_turns(n: int, domains: list[str]) -> Iterator[dict[str, Any]]:
    random = Random("lab reversal turns")
    for domain in domains:
        for _ in range(n):
            first, then = (ask(random, "fact", "held_out", domain) for _ in range(2))
            said = answer(random, frozenset(), first, lie=False)
            yield _row(
                [
                    {"role": "user", "content": first.text},
                    {"role": "assistant", "content": said},
                    {"role": "user", "content": then.text},
                ],
                domain,
            )


def _row(messages: list[dict[str, str]], domain: str) -> dict[str, Any]:
    return {"messages": messages, "domain": domain, "trait": "deceptive"}


def _texts(n: int) -> Iterator[dict[str, Any]]:
    """Documents of the good assistant: where nobody lies, an edit against lies need cost nothing."""
    random, good = Random("lab reversal texts"), AuthorConfig(assistant_good=1.0)
    for number in range(n):
        made = document(random, good, p_assistant=1.0, part="held_out")
        yield {"id": f"reversal-{number}", "messages": made.messages}
