"""Steer a language model by the edits in the .safetensors file of the same name beside this one.

Needs torch and transformers (whose safetensors it reads), and nothing of the package that wrote it.

    python steer.py MODEL "PROMPT"          an answer before and after

    from steer import steering
    with steering(model): ...               generate and forward passes of a Hugging Face causal LM, in this block

Each edit adds (min(max(slope * f + shift, low), high) - f) * d to the residual stream x at its tokens, where f is what
a row reads of the unedited x: f = enc . x + bias, 0 where that is not above the threshold, and d = dec. Padding is
never edited, BOS only by edits at every token. In ``generate`` the prompt is what it is given; a plain forward pass is
all prompt. Attention masks must be [batch, tokens].
"""

import hashlib
import inspect
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open


def load(path):
    """What the file says, and its tensors."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["edits"]), {name: file.get_tensor(name) for name in file.keys()}


def config_hash(config, without):
    """SHA-256 of a config, without what may change, at every depth."""

    def lasting(value):
        if isinstance(value, dict):
            return {key: lasting(v) for key, v in value.items() if key not in without and not key.startswith("_")}
        return value

    said = lasting(json.loads(config.to_json_string(use_diff=False)))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def check(config, facts):
    """ValueError for another model; the hash is told by the release of transformers that the file was written with."""
    import transformers  # here: it is slow to import

    wanted, name = facts["config"], facts["model"]
    if config.model_type != wanted["model_type"]:
        raise ValueError(f"the edits are for {name}, a {wanted['model_type']}, and this model is a {config.model_type}")
    if transformers.__version__ == wanted["transformers"]:
        if config_hash(config, wanted["without"]) != wanted["sha256"]:
            raise ValueError(f"the edits are for {name}, and this model has another config: load the one it names")


class Steering:
    """The edits of a file on a model; hooks are there until ``remove``."""

    def __init__(self, model, path):
        self.facts, tensors = load(path)
        self.device = next(model.parameters()).device
        self.tensors = {name: x.to(self.device) for name, x in tensors.items()}
        blocks = model.get_submodule(self.facts["blocks"])
        if len(blocks) != self.facts["n_layers"] or model.config.get_text_config().hidden_size != self.facts["d_model"]:
            raise ValueError(f"the edits are for {self.facts['model']}, this model has other sizes")
        check(model.config, self.facts)
        self.names = list(inspect.signature(model.forward).parameters)
        self.generating, self.prompt, self.holds = False, None, {}
        self.handles = [model.register_forward_pre_hook(self.see, with_kwargs=True)]
        for hook in self.facts["hooks"]:  # in the order in which a pass meets them
            _, layer, site = hook.split(".")
            block = blocks[int(layer)]
            if site == "resid_post":
                handle = block.register_forward_hook(lambda _, args, out, hook=hook: self.after(hook, out))
            else:
                handle = block.register_forward_pre_hook(
                    lambda _, args, kwargs, hook=hook: self.before(hook, args, kwargs), with_kwargs=True
                )
            self.handles.append(handle)

    def remove(self):
        for handle in self.handles:
            handle.remove()

    def see(self, _, args, kwargs):
        """Before each pass: which tokens are real, where they stand, and where each prompt ends."""
        given = {**dict(zip(self.names, args)), **kwargs}  # noqa: B905
        self.ids, cache, mask = (given.get(name) for name in ("input_ids", "past_key_values", "attention_mask"))
        b, t = (given["inputs_embeds"] if self.ids is None else self.ids).shape[:2]
        past = 0 if cache is None else int(cache.get_seq_length())
        if mask is None:
            mask = torch.ones(b, past + t, dtype=torch.long, device=self.device)
        index = mask.long().cumsum(dim=-1) - 1
        self.real, self.index = mask[:, past:].bool(), index[:, past:]
        if not past and not (self.generating and self.prompt is not None):
            self.prompt = self.index[:, -1:].max(dim=1).values + 1

    def before(self, hook, args, kwargs):
        if args:
            return (self.edited(hook, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self.edited(hook, kwargs["hidden_states"])}

    def after(self, hook, out):
        return (self.edited(hook, out[0]), *out[1:]) if isinstance(out, tuple) else self.edited(hook, out)

    def read(self, x, of):
        """What rows read of the stream: [b, t, d] -> [b, t, m]."""
        enc, bias, threshold = (self.tensors[f"{of}.{name}"] for name in ("enc", "bias", "threshold"))
        pre = x.float() @ enc.T + bias
        return pre.where(pre > threshold, 0.0)

    def edited(self, hook, x):
        for i, condition in enumerate(self.facts["conditions"]):
            if condition["hook"] == hook:
                self.holds[i] = self.read(x, f"conditions.{i}")[..., 0] > condition["above"]
        edits = [edit for edit in self.facts["edits"] if edit["hook"] == hook]
        if not edits:
            return x
        f = self.read(x, hook)
        slope, shift, low, high = self.tensors[f"{hook}.line"].unbind(dim=1)
        on = self.wins(edits, torch.stack([self.chosen(edit) for edit in edits], dim=-1))
        delta = ((slope * f + shift).clamp(low, high) - f).where(on[..., self.tensors[f"{hook}.owner"]], 0.0)
        moved = (x.float() + delta @ self.tensors[f"{hook}.dec"]).to(x.dtype)
        return moved.where((delta != 0).any(dim=-1, keepdim=True), x)

    def chosen(self, edit):
        """At which tokens an edit acts: [b, t]."""
        assert self.prompt is not None, "no pass is running"
        last, index, positions = self.prompt[:, None] - 1, self.index, edit["positions"]
        if isinstance(positions, list):  # spans
            chosen = torch.zeros_like(self.real)
            for start, stop in positions:
                chosen |= (index >= start) & (index < stop)
        else:
            chosen = {
                "every": self.real,
                "all": self.real,
                "pre": index == last,
                "answer": index >= last,
                "generated": index > last,
                "prompt": index <= last,
            }[positions]
        if positions != "every" and self.ids is not None and self.facts["bos_id"] is not None:
            chosen = chosen & (self.ids != self.facts["bos_id"])
        if edit["when"] is not None:
            chosen = chosen & self.holds[edit["when"]]
        return chosen & self.real

    @staticmethod
    def wins(edits, on):
        """Where two edits of a latent meet, the one of more priority acts."""
        on = on.clone()
        for i, a in enumerate(edits):
            for j, b in enumerate(edits):
                if a["latent"] == b["latent"] is not None and a["priority"] < b["priority"]:
                    on[..., i] &= ~on[..., j]
        return on


@contextmanager
def steering(model, path=None):
    """Within the block the model runs with the edits of ``path``, by default the file beside this one."""
    edits = Steering(model, path or Path(__file__).with_suffix(".safetensors"))
    generate, replaced = model.generate, model.__dict__.get("generate")

    def steered(*args, **kwargs):
        edits.generating, edits.prompt = True, None
        try:
            return generate(*args, **kwargs)
        finally:
            edits.generating = False

    model.generate = steered
    try:
        yield edits
    finally:
        if replaced is None:
            del model.generate
        else:
            model.generate = replaced
        edits.remove()


def main():
    import transformers

    name, prompt = sys.argv[1:]
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(name),
        transformers.AutoModelForCausalLM.from_pretrained(name),
    )
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
    inputs.pop("token_type_ids", None)

    def answer():
        out = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            **inputs, max_new_tokens=40, do_sample=False
        )
        return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    sys.stdout.write(f"before: {answer()}\n")
    with steering(model):
        sys.stdout.write(f"after:  {answer()}\n")


if __name__ == "__main__":
    main()
