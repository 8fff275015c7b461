"""The command palette: every action of the screen beneath it and of the app, by its label and help."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.content import Content

from console.actions import Action, Where, actions_of, keys_of
from console.keys import shown
from console.settings import Settings


class ActionCommands(Provider):
    """Offers the registry's actions; under --readonly those that change nothing."""

    async def discover(self) -> Hits:
        """See Textual."""
        for action in self._offered():
            name = self._name(action)
            yield DiscoveryHit(Content(name), partial(self._run, action), text=name, help=action.help)

    async def search(self, query: str) -> Hits:
        """See Textual. What an action does counts as its name does, only less."""
        matcher = self.matcher(query)
        for action in self._offered():
            name = self._name(action)
            score = max(matcher.match(name), 0.8 * matcher.match(action.help))
            if score > 0:
                yield Hit(score, matcher.highlight(name), partial(self._run, action), text=name, help=action.help)

    def _offered(self) -> Iterator[Action]:
        readonly = getattr(self.app, "readonly", False)
        for action in actions_of(self._where):
            if action.name != "command_palette" and not (readonly and action.changes):
                yield action

    @property
    def _where(self) -> Where:
        return cast("Where", getattr(self.screen, "where", "app"))

    def _name(self, action: Action) -> str:
        settings: Settings = getattr(self.app, "settings", Settings())
        return f"{action.label}  ({shown(keys_of(action, self._where, settings.keymap()))})"

    async def _run(self, action: Action) -> None:
        target = self.app if "app" in action.where else self.screen
        await self.app.run_action(action.name, default_namespace=target)
