"""How often a screen's t over questions calls an effect that is not there, by the number of questions.

python experiments/2026-11-causal-screen/level.py
"""

import numpy as np

from sae_persona.attribution.causal import over_units

SAMPLES = 40_000
EFFECTS = {
    "normal": lambda draw, shape: draw.standard_normal(shape),
    "Student's, 3 degrees of freedom": lambda draw, shape: draw.standard_t(3, shape),
    "exponential": lambda draw, shape: draw.exponential(size=shape) - 1,
}


def main() -> None:
    draw = np.random.default_rng(0)
    print("effects                          questions  p <= .05  p <= .0025")
    for name, effects in EFFECTS.items():
        for n in (5, 8, 10, 20):
            _, p = over_units(effects(draw, (n, SAMPLES)), np.arange(n))
            print(f"{name:33}{n:9}{(p <= 0.05).mean():10.3f}{(p <= 0.0025).mean():12.4f}")


if __name__ == "__main__":
    main()
