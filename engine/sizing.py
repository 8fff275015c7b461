"""What a run settles before it trains: the parts of a batch, the arithmetic of a token, the device's peak."""

from __future__ import annotations

from engine.config import RunConfig
from engine.device import Placement, device_free_bytes, shares_memory
from engine.efficiency import Meter
from engine.estimate import Device
from engine.flops import Peak, flops_per_token, peak_flops
from engine.formats import ModelFiles, inspect_model_dir, resolve_builtin
from engine.loading import Loaded
from engine.micro_batch import free_host_bytes, resolve
from engine.shapes import shape_of
from engine.step_clock import measure_peak, product_side
from engine.stream import Run


def settled(config: RunConfig, placement: Placement, before: Run | None) -> RunConfig:
    """The configuration with what depends on free memory found out; see `engine.micro_batch.resolve`.

    Args:
        config: of the run.
        placement: device and precision.
        before: the first `run` event of the stream, which a later attempt keeps to; None in a first attempt.

    Raises:
        ModelError: something is to be found out, and a model cannot be used.
    """
    train, student = config.train, config.student
    if train.accumulation != "auto" and (train.devices == 1 or train.parallel != "auto"):
        return config
    kinds: dict[str, Device] = {"cuda": "cuda", "mps": "mps"}
    shared = shares_memory(placement.device)
    return resolve(
        config,
        _teacher_files(config),
        inspect_model_dir(resolve_builtin(student.source), "student", need_weights=not student.starts_random),
        device=kinds.get(placement.device.type, "cpu"),
        shared=shared,
        free_device=device_free_bytes(placement.device),
        free_host=free_host_bytes(shared=shared),
        before=before,
    )


def peak_of(placement: Placement) -> Peak:
    """The device's published peak; a measured one where there is none."""
    published = peak_flops(placement.name, placement.precision)
    if published is not None:
        return published
    side = product_side(placement.device)
    return Peak(measure_peak(placement.device, placement.dtype), f"measured: a product of {side:,} x {side:,}")


def meter_of(config: RunConfig, loaded: Loaded, peak: Peak) -> Meter:
    """What tells how fast the run is and how much of the device it uses.

    Args:
        config: of the run.
        loaded: its models.
        peak: of one device.

    Raises:
        ModelError: a weight file's header cannot be read again.
    """
    teacher = _teacher_files(config)
    flops = flops_per_token(
        shape_of(loaded.student.files, config.student.layers),
        None if teacher is None else shape_of(teacher),
        config.teacher.source if config.teacher else "online",
    )
    return Meter(flops, peak, config.train.devices)


def _teacher_files(config: RunConfig) -> ModelFiles | None:
    if config.teacher is None:
        return None
    return inspect_model_dir(resolve_builtin(config.teacher.path), "teacher")
