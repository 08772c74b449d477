"""Checkpoints that act edited without a hook: constants as biases, ablated directions out of the weights.

Three changes do what edits do; which holds for a model is tried on a few tokens before anything is written:

    an addition behind a block       the bias of its MLP's output; Llama's config has ``mlp_bias``, others have biases
    any edit of what enters block 0  a row of the embeddings is all that is read there: it is edited
    project_out at every hook point  the directions leave the embeddings and all that attention and MLP write

The last is exact where attention and MLP read the same stream (GPT-NeoX, GPT-J, Phi). Elsewhere the MLP reads what the
attention has added within the block, which no hook point shows, and it is refused.
"""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae_persona.activations.lm import LM, wrap_lm
from sae_persona.errors import ConfigError
from sae_persona.runs import write_whole
from sae_persona.steering.export.additive import EMBEDDINGS, INSTEAD, additive, by_layer, check_everywhere
from sae_persona.steering.export.intervention import Intervention
from sae_persona.steering.export.peft_adapter import FACTS, biased, facts
from sae_persona.steering.export.weights import attention_output, check_same, mlp_output, rows_first
from sae_persona.steering.interventions import ProjectOut
from sae_persona.types import HookPoint

TOOL = "a baked checkpoint"
MARK = "config.json"
FIRST = HookPoint(0, "resid_pre")


@torch.no_grad()
def write(intervention: Intervention, lm: LM, path: Path) -> Path:
    """Write model and tokenizer with the edits in the weights, in Hugging Face layout.

    ConfigError for edits that act at some tokens only or that weights cannot do, and for models in which they would do
    something else.
    """
    check_everywhere(intervention, TOOL)
    model = copy.deepcopy(lm.model)
    baked = wrap_lm(model, lm.tokenizer, name=lm.name, blocks=lm.blocks_path)
    if intervention.hooks == [FIRST]:
        _edit_embeddings(baked, intervention)
    elif any(isinstance(one.edit, ProjectOut) for one in intervention.edits):
        _fold_out(baked, intervention)
    else:
        layers = by_layer(additive(intervention, TOOL))
        if EMBEDDINGS in layers:
            raise ConfigError(f"{TOOL} adds behind blocks or to what enters the first, not both: export them apart")
        outputs = {layer: mlp_output(lm, layer, TOOL) for layer in layers}
        behind = {name: (module, layers[layer]) for layer, (name, module) in outputs.items()}
        check_same(lm, intervention, lambda inputs: biased(lm, behind, inputs), TOOL)
        _add_biases(baked, layers)
    check_same(lm, intervention, lambda inputs: model(**inputs).logits, TOOL)

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary)  # pyright: ignore[reportCallIssue]
        lm.tokenizer.save_pretrained(temporary)
        (temporary / FACTS).write_text(json.dumps(facts(intervention), indent=1) + "\n", encoding="utf-8")

    write_whole(path, fill, mark=MARK)
    return path


def _add_biases(lm: LM, layers: dict[int, Tensor]) -> None:
    config: Any = lm.model.config
    outputs = {layer: mlp_output(lm, layer, TOOL)[1] for layer in layers}
    if any(module.bias is None for module in outputs.values()):
        if not hasattr(config, "mlp_bias"):
            raise ConfigError(
                f"the MLPs of {lm.name} have no bias, and its config ({config.model_type}) knows none: "
                "choose --format peft"
            )
        config.mlp_bias = True
        for block in lm.blocks:  # the config speaks of all of them
            for module in block.get_submodule("mlp").modules():
                if isinstance(module, nn.Linear) and module.bias is None:
                    module.bias = nn.Parameter(module.weight.new_zeros(module.out_features), requires_grad=False)
    for layer, vector in layers.items():
        bias = outputs[layer].bias
        assert isinstance(bias, Tensor)
        bias.copy_(bias.float() + vector.to(bias.device))


def _edit_embeddings(lm: LM, intervention: Intervention) -> None:
    weight = _untied(lm)
    rows = intervention.rows(FIRST)
    weight.copy_(rows.moved(weight.float().cpu()))


def _fold_out(lm: LM, intervention: Intervention) -> None:
    """W - Q^T Q W of all that is written into the stream, Q [m, d] orthonormal."""
    spans = [one.edit.basis for one in intervention.edits if isinstance(one.edit, ProjectOut)]
    q = spans[0].double()
    wanted = {FIRST, *(HookPoint(layer) for layer in range(lm.n_layers))}
    same = all(len(s) == len(q) and torch.allclose(s.double().T @ s.double(), q.T @ q, atol=1e-5) for s in spans)
    if len(spans) < len(intervention.edits) or not same or not wanted <= set(intervention.hooks):
        raise ConfigError(
            f"{TOOL} can project out one set of directions at {FIRST} and behind every block, or at {FIRST} alone, "
            f"and the edits are others: {INSTEAD}"
        )
    _project(_untied(lm).T, q)
    for layer in range(lm.n_layers):
        for _, module in (attention_output(lm, layer, TOOL), mlp_output(lm, layer, TOOL)):
            assert isinstance(module.weight, Tensor)
            _project(rows_first(module, module.weight), q)
            if isinstance(module.bias, Tensor):
                _project(module.bias[:, None], q)


def _project(weight: Tensor, q: Tensor) -> None:
    """In place, a weight [d, ...] whose output loses the span of q."""
    w = weight.double()
    q = q.to(w.device)
    weight.copy_(w - q.T @ (q @ w))


def _untied(lm: LM) -> Tensor:
    """The embeddings [n_tokens, d], which the output head no longer shares."""
    model: Any = lm.model
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    return embeddings.weight
