"""A snippet for nnsight: ``NAME.py`` with the intervention written out, and its tables in ``NAME.safetensors``."""

from pathlib import Path

from sae_persona.activations.lm import LM
from sae_persona.errors import ConfigError
from sae_persona.runs import write_text
from sae_persona.steering.export.additive import INSTEAD, check_everywhere
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.export.steer_script import table, write_data

TOOL = "an nnsight snippet"
SNIPPET = '''"""Edits of {model} in nnsight, at every token. The tables are in the .safetensors file beside this one.

    from nnsight import LanguageModel
    model = LanguageModel("{model}")
    logits = steered(model, "PROMPT")
"""

from pathlib import Path

from safetensors.torch import load_file

TABLES = load_file(Path(__file__).with_suffix(".safetensors"))


def edited(hook, x):
    """x + sum of (min(max(slope * f + shift, low), high) - f) * dec, f = enc . x + bias above the threshold, else 0."""
    enc, dec, bias, threshold, line = (
        TABLES[f"{{hook}}.{{name}}"].to(x.device) for name in ("enc", "dec", "bias", "threshold", "line")
    )
    pre = x.float() @ enc.T + bias
    f = pre.where(pre > threshold, 0.0)
    slope, shift, low, high = line.unbind(dim=1)
    delta = (slope * f + shift).clamp(low, high) - f
    return (x.float() + delta @ dec).to(x.dtype)


def steered(model, prompt):
    """Logits of a forward pass with the edits. Everything between the calls of nnsight is torch."""
    with model.trace(prompt):
{edits}
        logits = model.lm_head.output.save()
    return logits
'''


def write(intervention: Intervention, lm: LM, path: Path) -> Path:
    """Write snippet and tables.

    ConfigError for conditions, edits at some tokens only, before the first block, of one latent with priorities, pins
    and SAEs that must be read whole.
    """
    check_everywhere(intervention, TOOL)
    if len({(one.hook, one.priority) for one in intervention.edits}) > len(intervention.hooks):
        raise ConfigError(f"{TOOL} knows no priorities: {INSTEAD}")
    tensors, facts = table(intervention, lm, TOOL)
    lines = []
    for hook in intervention.hooks:
        layer = hook.layer if hook.site == "resid_post" else hook.layer - 1
        if layer < 0:
            raise ConfigError(f"{TOOL} edits outputs of blocks, not what enters the first: choose --format steer-py")
        place = f"model.{lm.blocks_path}[{layer}].output"
        lines.append(f'        {place} = edited("{hook}", {place})')
    head = next(name for name, module in lm.model.named_modules() if module is lm.model.get_output_embeddings())  # pyright: ignore
    text = SNIPPET.format(model=lm.name, edits="\n".join(lines)).replace("model.lm_head", f"model.{head}")
    write_data(path, tensors, facts)
    write_text(path, text)
    return path
