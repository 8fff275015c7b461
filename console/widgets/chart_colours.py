"""The colours of the chart's curves on dark, light and sixteen-colour terminals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from console import palette

_DARK = {
    "total": palette.SKY,
    "ce": palette.ORANGE,
    "kd": palette.PURPLE,
    "held-out": palette.YELLOW,
    "agreement": palette.SKY,
    "cosine": palette.ORANGE,
}
_LIGHT = {
    "total": palette.BLUE,
    "ce": palette.VERMILLION_DARKER,
    "kd": palette.PURPLE_DARKER,
    "held-out": "#8A6D00",
    "agreement": palette.BLUE,
    "cosine": palette.VERMILLION_DARKER,
}
_ANSI = {
    "total": "ansi_blue",
    "ce": "ansi_yellow",
    "kd": "ansi_magenta",
    "held-out": "ansi_green",
    "agreement": "ansi_blue",
    "cosine": "ansi_yellow",
}
_ANSI_RUNS = ("ansi_blue", "ansi_yellow", "ansi_green", "ansi_magenta", "ansi_cyan", "ansi_red")
_FAINT = " 45%"


def _curves(selector: str, of: Mapping[str, str], runs: Sequence[str], band: str) -> str:
    """Rules that give curves their colours, and the envelopes behind them the same, but weaker."""
    rules = [f"{selector} .loss-chart--{name} {{ color: {colour}; }}" for name, colour in of.items()]
    rules.append(f"{selector} .loss-chart--band {{ color: {of['total']}{band}; }}")
    for i, colour in enumerate(runs):
        rules.append(f"{selector} .loss-chart--run-{i} {{ color: {colour}; }}")
        rules.append(f"{selector} .loss-chart--band-{i} {{ color: {colour}{band}; }}")
    return "\n".join(rules)


def _plain(selector: str) -> str:
    """Rules for a screen without colours, where what they become would tell one curve's rank by chance."""
    names = (*_DARK, *(f"run-{i}" for i in range(len(_ANSI_RUNS))), "bad", "beyond", "gap")
    return "\n".join(f"{selector} .loss-chart--{name} {{ color: $foreground; }}" for name in names)


CSS = f"""
LossChart .loss-chart--text {{ color: $foreground 75%; }}
LossChart .loss-chart--faint {{ color: $foreground 60%; }}
LossChart .loss-chart--axis {{ color: $foreground 35%; }}
LossChart .loss-chart--gap {{ color: $warning; }}
LossChart .loss-chart--bad {{ color: $error; text-style: bold; }}
LossChart .loss-chart--beyond {{ color: $warning; text-style: bold; }}
LossChart .loss-chart--cursor {{ background: $primary 35%; }}
{_curves("LossChart", _DARK, palette.RUN_COLOURS_DARK, _FAINT)}
{_curves("LossChart:light", _LIGHT, palette.RUN_COLOURS_LIGHT, _FAINT)}
{_curves("LossChart:ansi", _ANSI, _ANSI_RUNS, "; text-style: dim")}
LossChart:ansi .loss-chart--axis {{ color: ansi_default; text-style: dim; }}
LossChart:ansi .loss-chart--text {{ color: ansi_default; }}
LossChart:ansi .loss-chart--faint {{ color: ansi_default; text-style: dim; }}
LossChart:ansi .loss-chart--cursor {{ text-style: reverse; }}
LossChart:nocolor .loss-chart--cursor {{ text-style: reverse; }}
{_plain("LossChart:nocolor")}
"""
