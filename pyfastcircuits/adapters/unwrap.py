"""Models inside of what other libraries put around them: compiled, parallel, PEFT's, nnsight's and nnterp's."""

from typing import Any

from torch import nn

_AROUND = ("_orig_mod", "module", "_model", "_module")  # torch.compile, DataParallel, nnsight


def unwrapped(model: Any) -> Any:
    """The model that others are wrapped around, whose modules compute what the whole computes.

    Raises:
        ValueError: a wrapper that changes the model's input: prompts that PEFT has learned.
    """
    while True:
        inner = _inner(model)
        if inner is None:
            return model
        model = inner


def _inner(model: Any) -> Any:
    if getattr(model, "dispatched", True) is False and hasattr(model, "dispatch"):
        raise ValueError(
            f"model is a {type(model).__name__} that has not loaded its weights: call its dispatch() first"
        )
    held = vars(model) if hasattr(model, "__dict__") else {}
    if callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
        active = getattr(model, "active_peft_config", None)
        if getattr(active, "is_prompt_learning", False):
            raise ValueError(
                f"model is a {type(model).__name__} with {getattr(active, 'peft_type', 'learned prompts')}: it puts "
                "tokens of its own in front, which a trace does not represent"
            )
        return model.get_base_model()
    for name in _AROUND:
        inner = held.get(name) or held.get("_modules", {}).get(name)
        if isinstance(inner, nn.Module) and (name != "module" or type(model).__module__.startswith("torch.")):
            return inner
    return None
