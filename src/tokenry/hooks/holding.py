"""A model that is being changed belongs to one thread, until the last one who changes it has left.

Every context that hooks a model, or changes it in another way, holds it meanwhile. Contexts of one thread share a model
and may leave in any order: what they have in common is put back when the last one leaves. Another thread is refused,
with a sentence, where it enters a context and where it runs the model; it never sees what this one has changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..models.anatomy import decoder_body

__all__ = ["Held", "hold", "hooked", "owned"]

T = TypeVar("T")
_LOCK = threading.RLock()
_HELD: WeakKeyDictionary[nn.Module, Held] = WeakKeyDictionary()  # by the body, which every forward goes through


class Held:
    """A model while it is changed: by which thread, by how many contexts, and what these have in common."""

    def __init__(self, model: PreTrainedModel, body: nn.Module) -> None:
        self.thread = threading.current_thread()
        self.users = 0
        self.guard = body.register_forward_pre_hook(_guard(model, self.thread), with_kwargs=True)
        self._shared: dict[str, tuple[ExitStack, Any, list[None]]] = {}

    @contextmanager
    def shared(self, name: str, change: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """A change that several contexts need and that is made once: the first one enters `change()`, the last one
        leaves it."""
        with _LOCK:
            if name not in self._shared:
                stack = ExitStack()
                self._shared[name] = (stack, stack.enter_context(change()), [])
            stack, value, users = self._shared[name]
            users.append(None)
        try:
            yield value
        finally:
            with _LOCK:
                users.pop()
                if not users:
                    del self._shared[name]
                    stack.close()


@contextmanager
def hold(model: PreTrainedModel) -> Iterator[Held]:
    """Claim a model for this thread, for as long as the context that changes it lasts.

    Raises:
        InputError: a compiled model, or one that another thread holds.
    """
    with _LOCK:
        body = decoder_body(model)
        if body not in _HELD:
            _refuse_compiled(model)
            _HELD[body] = Held(model, body)
        held = _HELD[body]
        _refuse_others(held.thread)
        held.users += 1
    try:
        yield held
    finally:
        with _LOCK:
            held.users -= 1
            if not held.users:
                del _HELD[body]
                held.guard.remove()


@contextmanager
def hooked(module: nn.Module, hook: Callable, before: bool = False, **options: bool) -> Iterator[None]:
    """Run a forward hook of a module that is held, with the `options` of torch; `before`: ahead of its forward.

    With `always_call` it does not run for another thread, whose forward has been refused by then.
    """
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(owned(hook, quiet=options.get("always_call", False)), **options)
    try:
        yield
    finally:
        handle.remove()


def owned(function: Callable[..., T], quiet: bool = False) -> Callable[..., T | None]:
    """A function that only this thread may run: another one may have been inside the model when it was changed. It is
    refused, or with `quiet` nothing is done."""
    thread = threading.current_thread()

    def own(*args: Any, **kwargs: Any) -> T | None:
        if quiet and not _may_use(thread):
            return None
        _refuse_others(thread)
        return function(*args, **kwargs)

    return own


def _guard(model: PreTrainedModel, thread: threading.Thread) -> Callable[[nn.Module, tuple, dict], None]:
    """What runs first in each forward of a model that is held."""

    def guard(module: nn.Module, args: tuple, kwargs: dict) -> None:
        _refuse_others(thread)
        if getattr(kwargs.get("past_key_values"), "is_compileable", False) and "_compiled_call" in vars(model):
            raise InputError(
                "generate compiles a model with a static cache, and that bypasses Python hooks; use the default cache, "
                "or disable_compile=True and a model that was not compiled before"
            )

    return guard


def _may_use(thread: threading.Thread) -> bool:
    """Whether this is the thread given. A checkpointed backward runs forwards in threads of torch."""
    return threading.current_thread() is thread or torch._C._current_graph_task_id() != -1


def _refuse_others(thread: threading.Thread) -> None:
    if not _may_use(thread):
        raise InputError(
            f"the thread {thread.name!r} has changed this model, so {threading.current_thread().name!r} may not use it "
            "now; enter the context in the thread that runs the model, or wait until the other one has left it"
        )


def _refuse_compiled(model: PreTrainedModel) -> None:
    for module in model.modules():
        in_place = module._compiled_call_impl is not None  # model.compile()
        forward = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")  # forward = torch.compile(forward)
        if in_place or forward or "_orig_mod" in module._modules:
            raise InputError("a compiled model bypasses Python hooks; use one that has not been compiled")
