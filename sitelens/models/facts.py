"""Facts: everything that determines what a network computes (tensors, plain attributes of modules, configurations).

A configuration alone is not enough: modules copy some numbers from it when they are built (`attn.scaling`,
`norm.variance_epsilon`), read others at every pass, and both may be edited later. So modules and configurations are
both read completely, except for bookkeeping.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Configuration fields that do not affect logits: names, labels, output formats, generation, initialization.
# Token ids are included because prompts are given as ids; those that end a text are in the keys of generated answers.
BOOKKEEPING = frozenset(
    """
    name_or_path model_type transformers_version architectures dtype torch_dtype auto_map tokenizer_class torchscript
    use_cache output_attentions output_hidden_states output_router_logits return_dict use_return_dict
    id2label label2id num_labels problem_type finetuning_task task_specific_params classifier_dropout
    summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    initializer_range initializer_factor init_std router_aux_loss_coef gradient_checkpointing is_encoder_decoder
    """.split()  # noqa: SIM905 (a table of names)
)
# Module attributes that do not affect the computation, set by PyTorch, transformers, accelerate or TransformerLens.
_BESIDE = frozenset(vars(nn.Module())) | frozenset(
    """
    name_or_path warnings_issued generation_config loss_type gradient_checkpointing hf_device_map hf_quantizer
    is_loaded_in_4bit is_quantized quantization_method compute_type_is_set kernel_config all_tied_weights_keys
    forward _forward _old_forward _hf_hook _is_hf_initialized persistent _is_buffer
    """.split()  # noqa: SIM905 (a table of names)
)
_DEPTH = 6  # nesting depth to which attributes are read
_SCALARS = frozenset({bool, int, float, str, type(None)})
_PLAIN = (bool, int, str, type(None))


@dataclass
class Facts:
    """The facts of a network. Names are those of the raw network, whether or not a bridge wraps its modules.

    Attributes:
        plain: plain JSON by the name of the module or tensor that it describes.
        tensors: each tensor once, by name.
    """

    plain: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)
    _pending: list[tuple[str, nn.Module]] = field(default_factory=list)

    @staticmethod
    def of(network: nn.Module) -> Facts:
        """The facts of a Hugging Face network, whose modules may be wrapped by a bridge."""
        facts = Facts()
        facts._pending.append(("", network))
        while facts._pending:
            name, module = facts._pending.pop()
            if id(module) not in facts._seen:
                facts._seen.add(id(module))
                facts._visit(name, module)
        return facts

    def _visit(self, name: str, module: nn.Module) -> None:
        wrapper = isinstance(module, GeneralizedComponent)
        changing = _recomputed(module)
        for group in (module._parameters, module._buffers):
            for key, tensor in group.items():
                if tensor is not None and key not in changing:
                    self._tensor(f"{name}.{key}", tensor)
        inner = None
        for key, child in module._modules.items():
            if wrapper and key == "_original_component":
                inner = child
            elif child is not None and type(child) is not HookPoint:
                self._pending.append((f"{name}.{key}" if name else key, child))
        if inner is not None:
            self._pending.append((name, inner))  # popped next, so that its children get their own names
        if wrapper:
            return
        described: dict[str, Any] = {}
        for key, value in vars(module).items():
            if key in _BESIDE or key in changing or _of_dropout(module, key):
                continue
            if not (key.startswith("_") and isinstance(module, PreTrainedModel)):  # only for loading and saving
                described[key] = self.described(value, f"{name}.{key}")
        for key, value in changing.items():
            if value is not None:
                described[key] = self.described(value, f"{name}.{key}")
        if module.training:
            described["training"] = True
        kind = type(module)
        self.plain[name] = [f"{kind.__module__}.{kind.__qualname__}", described]

    def described(self, value: Any, name: str, depth: int = 0) -> Any:
        """A value as plain JSON; tensors and modules inside it are recorded under its name."""
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, float):
            return repr(value)
        if isinstance(value, Tensor):
            self._tensor(name, value)
            return "tensor"
        if isinstance(value, nn.Module):
            if id(value) not in self._seen and not isinstance(value, HookPoint):
                self._pending.insert(0, (name, value))  # visited last, so that a module has the name from its parent
            return "module"
        if depth >= _DEPTH:
            return f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, (list, tuple)):
            return [self.described(item, f"{name}.{i}", depth + 1) for i, item in enumerate(value)]
        if isinstance(value, Mapping):
            return {str(key): self.described(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
        if isinstance(value, (set, frozenset)):
            return sorted(map(str, value))
        if isinstance(value, PreTrainedConfig):
            return self._configuration(value, name, depth)
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, (torch.dtype, torch.Size, Enum)):
            return str(value)
        if isinstance(value, functools.partial):
            parts = [value.func, value.args, value.keywords]
            return [self.described(part, f"{name}.{i}", depth + 1) for i, part in enumerate(parts)]
        if isinstance(value, type) or (isinstance(value, Callable) and hasattr(value, "__qualname__")):
            return f"{value.__module__}.{value.__qualname__}"
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if id(value) in self._seen or not hasattr(value, "__dict__"):
            return kind
        self._seen.add(id(value))
        inside = {key: self.described(item, f"{name}.{key}", depth + 1) for key, item in vars(value).items()}
        return [kind, inside]

    def _configuration(self, config: PreTrainedConfig, name: str, depth: int) -> Any:
        if id(config) in self._seen:
            return "config"
        self._seen.add(id(config))
        content = {
            key: self.described(value, f"{name}.{key}", depth + 1)
            for key, value in sorted(vars(config).items())
            if not key.startswith("_") and key not in BOOKKEEPING and "dropout" not in key and "pdrop" not in key
        }
        return [f"{type(config).__module__}.{type(config).__qualname__}", content]

    def _tensor(self, name: str, tensor: Tensor) -> None:
        if id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        flatten: Any = getattr(tensor, "__tensor_flatten__", None)
        if flatten is not None:  # a packed tensor subclass, such as torchao's
            inner, context = flatten()
            self.plain[name] = [type(tensor).__qualname__, self.described(context, name, 1)]
            for key in inner:
                self._tensor(f"{name}.{key}", getattr(tensor, key))
            return
        self.tensors[name] = tensor
        state = {key: value for key, value in vars(tensor).items() if key not in _BESIDE}
        if state:  # set by bitsandbytes on packed weights
            self.plain[name] = {key: self.described(value, f"{name}.{key}", 1) for key, value in state.items()}


def bridge_facts(model: TransformerBridge, modules: Iterable[tuple[str, nn.Module]]) -> Facts:
    """The facts of the bridge around a network: its configuration, its switches, and those of its wrappers.

    Configuration fields that do not affect logits are left out.

    Args:
        model: the bridge.
        modules: its modules, as returned by `modules_of`.
    """
    facts = Facts()
    cfg = {key: value for key, value in vars(model.cfg).items() if key not in BOOKKEEPING | _BRIDGE_BOOKKEEPING}
    facts.plain["cfg"] = facts.described(cfg, "cfg")
    facts.plain["compatibility_mode"] = bool(model.compatibility_mode)
    for name, module in modules:
        if isinstance(module, GeneralizedComponent):
            switches: dict[str, Any] = {}
            inner = module._modules.get("_original_component")
            known = () if inner is None else [id(tensor) for tensor in inner._parameters.values()]
            for key, value in vars(module).items():
                if type(value) in _SCALARS:
                    if key not in _BESIDE and (key[0] != "_" or key in _PRIVATE_SWITCHES):
                        switches[key] = value
                elif isinstance(value, Tensor) and not key.startswith("_") and id(value) not in known:
                    facts._tensor(f"{name}.{key}", value)
            facts.plain[name] = [type(module).__qualname__, module.compatibility_mode, switches]
    return facts


def modules_of(model: TransformerBridge, hook_points: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """All modules of the bridge and of its network, as (name, module), each once; hook points only if asked for."""
    seen: set[int] = set()
    pending: list[tuple[str, nn.Module]] = [("the network", model.original_model), ("the bridge", model)]
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if hook_points or type(module) is not HookPoint:
            yield name, module
        if module._modules:
            start = "" if name in ("the network", "the bridge") else f"{name}."
            for key, child in module._modules.items():
                if child is not None:
                    pending.append((start + key, child))


# Private attributes of wrappers that affect the computation; the others only record the last forward pass.
_PRIVATE_SWITCHES = frozenset(
    """
    _output_contribution_scale _uses_rms_norm_override _uses_weight_offset_override _qk_norm_phase _qk_norm_per_head
    _reorder_and_upcast_attn
    """.split()  # noqa: SIM905 (a table of names)
)
_BRIDGE_BOOKKEEPING = frozenset(
    """
    model_name device n_devices default_prepend_bos default_padding_side tokenizer_name tokenizer_prepends_bos
    tokenizer_appends_eos original_architecture architecture from_checkpoint checkpoint_index checkpoint_label_type
    checkpoint_value init_mode init_weights seed n_params trust_remote_code use_hook_tokens
    """.split()  # noqa: SIM905 (a table of names)
)


def rotary_state(name: str, module: nn.Module, facts: Facts) -> None:
    """Record in `facts` how longer prompts have rescaled a rotary embedding, if later results depend on it.

    A long-rope module recomputes its frequencies for each prompt, so these are not state.
    """
    for key, value in _recomputed(module).items():
        if value is None and "dynamic" in str(vars(module)["rope_type"]):
            facts.plain[f"{name}.{key}"] = facts.described(getattr(module, key, None), f"{name}.{key}")


def _of_dropout(module: nn.Module, key: str) -> bool:
    """Whether an attribute is a dropout rate, which matters in training mode only."""
    if module.training:
        return False
    return "dropout" in key or "pdrop" in key or (key == "p" and isinstance(module, nn.modules.dropout._DropoutNd))


def _recomputed(module: nn.Module) -> dict[str, Any]:
    """The attributes that a rotary embedding recomputes from a prompt's length, with the values recorded instead.

    None means that nothing is recorded: what the attribute was after the last prompt does not matter.
    """
    kinds = vars(module).get("rope_type")
    if kinds is None or not hasattr(module, "config"):
        return {}
    found: dict[str, Any] = {}
    for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        prefix = "" if layer_type is None else f"{layer_type}_"
        if "dynamic" in str(kind):
            found |= dict.fromkeys((f"{prefix}inv_freq", f"{prefix}max_seq_len_cached", "max_seq_len_cached"))
        elif kind == "longrope":
            found[f"{prefix}inv_freq"] = None
            found[f"{prefix}long_inv_freq"] = _long_frequencies(module, prefix, layer_type)
    return found


def _long_frequencies(module: Any, prefix: str, layer_type: str | None) -> Tensor:
    """A long-rope module's frequencies for long prompts, which it computes at its first forward pass."""
    known = getattr(module, f"{prefix}long_inv_freq", None)
    if known is not None:
        return known
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    length = parameters["original_max_position_embeddings"] + 1
    options = {} if layer_type is None else {"layer_type": layer_type}
    device = getattr(module, f"{prefix}inv_freq").device
    return ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=length, **options)[0]
