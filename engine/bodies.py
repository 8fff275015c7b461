"""How the bodies of teacher and student compute: compiled or not, and what a student keeps for its backward pass.

torch.compile goes layer by layer, for the shapes that training has. Layers of one model have the same code, so that it
is compiled once and not once a layer: a body of 28 is ready in the time of one. Modules are compiled in place and keep
their names. Held-out figures come from the eager bodies (see `Bodies.eager`), as they come from the plain loss: what a
compiler gets wrong would show as a disagreement between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from engine.errors import ModelError
from engine.models import CausalLM, layer_lists
from engine.text import clean

_TOLERANCE, _NARROW_TOLERANCE = 1e-3, 5e-2
"""Largest difference of compiled hidden states to eager ones, by the largest of them: in float32, and in less."""
_FORMS = 64
"""Forms of one layer's code: kinds of layers times shapes times models. torch's own limit is 8."""


class Bodies:
    """The bodies of a run's models; eager, until they are compiled.

    Args:
        models: on the device that trains.
        autocast: the trainer's autocast dtype, None for none.
    """

    def __init__(self, models: Sequence[CausalLM], autocast: torch.dtype | None) -> None:
        self._models, self._autocast, self._compiled = models, autocast, False

    def compile(self, shapes: Iterable[tuple[int, int]]) -> str:
        """Compiles the layers and runs each model once, so that training finds them ready.

        Gradients and random generators are left as they were. Where one model fails to compile, or comes to other
        hidden states than its eager self, all stay eager.

        Args:
            shapes: of the micro-batches, each [windows, sequence].

        Returns:
            Why nothing is compiled, in words; empty where all is well.

        Raises:
            torch.OutOfMemoryError: a micro-batch does not fit.
        """
        torch._dynamo.config.recompile_limit = max(_FORMS, torch._dynamo.config.recompile_limit)
        shapes, self._compiled, problem = list(shapes), True, ""
        try:
            for model in self._models:
                for layer in layers_of(model):
                    layer.compile(dynamic=False)
                tried = (self._try(model, torch.Size(shape)) for shape in shapes)
                problem = problem or next(filter(None, tried), "")
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ImportError, OSError) as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[0]
        if problem:
            self.release()
        return problem

    def release(self) -> None:
        """Makes the models eager again."""
        self._compiled = False
        for model in self._models:
            for layer in layers_of(model):
                layer._compiled_call_impl = None

    def eager(self) -> AbstractContextManager[object]:
        """Inside of it the models run eagerly, and nothing is compiled for other shapes or modes."""
        stance: AbstractContextManager[object] = (
            torch.compiler.set_stance("force_eager") if self._compiled else nullcontext()
        )
        return stance

    def _try(self, model: CausalLM, shape: torch.Size) -> str:
        """Runs one micro-batch, backward too where the model is trained; how it differs from the eager one."""
        parameter = next(model.model.parameters())
        device, dtype = parameter.device, self._autocast or parameter.dtype
        trained = any(p.requires_grad for p in model.model.parameters())
        probe = torch.arange(shape.numel(), device=device).remainder(model.vocab).view(shape)

        def run(seed: int, *, backward: bool = False) -> Tensor:
            gpu = device.type == "cuda"
            with torch.random.fork_rng(devices=[device] if gpu else []), torch.set_grad_enabled(backward):
                torch.default_generator.manual_seed(seed)
                if gpu:
                    torch.cuda.manual_seed(seed)
                with torch.autocast(device.type, dtype=self._autocast, enabled=self._autocast is not None):
                    out = model.logits(probe) if model.head is None else model.hidden(probe)
                if backward:
                    out.float().square().mean().backward()  # type: ignore[no-untyped-call]
            return out.detach().float()

        with self.eager():
            expected, repeated = run(0), run(1)
        found = run(0, backward=trained)
        model.model.zero_grad(set_to_none=True)
        if not torch.equal(expected, repeated):
            return ""  # dropout: what is drawn is not the same compiled
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if error <= (_TOLERANCE if dtype == torch.float32 else _NARROW_TOLERANCE):
            return ""
        return f"{model.name} differs from its eager self by {error:.2g} of the largest hidden state"


def layers_of(model: CausalLM) -> list[nn.Module]:
    """The layers of a model's body, or the body as a whole where they are not one list."""
    body: nn.Module = model.model.base_model
    names = layer_lists(body, int(model.model.config.get_text_config().num_hidden_layers))
    return list(body.get_submodule(names[0]).children()) if len(names) == 1 else [body]


def checkpoint_activations(student: CausalLM) -> None:
    """Has a model keep a layer's input alone in training, and compute the layer again in the backward pass.

    Raises:
        ModelError: the architecture does not know how.
    """
    settings = {"use_reentrant": False}
    try:
        if hasattr(student.model, "activation_checkpointing_enable"):  # its newer name
            student.model.activation_checkpointing_enable(settings)
        else:
            student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    except ValueError as error:
        raise ModelError(
            f"student {student.name}: train.activation_checkpointing: {clean(str(error), 200)}",
            expected="an architecture that can compute its layers again",
            do="leave the key out; train.accumulation saves memory too",
        ) from None
