"""Every action of the app, once: bindings, footer, help, command palette and the README's table come from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from textual.binding import Binding, BindingType

Where = Literal["app", "home", "run", "review", "compare", "new", "hosts", "help", "confirm", "choose"]
"""A screen, or `app` for everywhere but in the dialogs."""

SCREENS: Final[dict[Where, str]] = {
    "app": "Everywhere",
    "home": "Home",
    "run": "Run",
    "review": "Review",
    "compare": "Compare",
    "new": "New run",
    "hosts": "Hosts",
    "help": "Help",
    "confirm": "Question",
    "choose": "Choice",
}
"""What each is called on the screen and in the documents."""
DASHBOARDS: Final[tuple[Where, ...]] = ("run", "review")
"""The screens of one run: one that is followed, and evidence that is looked at."""
DIALOGS: Final = frozenset(("help", "confirm", "choose"))
"""They lie over a screen and take every key: the app's actions wait until they are gone."""


@dataclass(frozen=True)
class Action:
    """Something that an operator can do.

    `name` is the id in a key map and the method `action_<name>` of the screen (or the app); `keys` are separated by
    commas; `changes` says that it starts, stops or writes something, which --readonly forbids.
    """

    name: str
    keys: str
    label: str
    help: str
    where: tuple[Where, ...]
    changes: bool = False
    footer: bool = True


ACTIONS: tuple[Action, ...] = (
    Action("help", "question_mark,f1", "help", "Show what every key does here.", ("app",)),
    Action("command_palette", "ctrl+p", "palette", "Find an action by its name.", ("app",), footer=False),
    Action("leave", "q", "leave", "Leave the app; runs go on.", ("app",)),
    Action("back", "escape", "back", "Go back to where you came from.", (*DASHBOARDS, "compare", "new", "hosts")),
    Action("toggle_dark", "d", "dark", "Switch between the dark and the light theme.", ("app",), footer=False),
    # Home
    Action("open", "enter", "open", "Open the run under the cursor.", ("home",)),
    Action("new_run", "n", "new run", "Choose a configuration and start a smoke or a training.", ("home",), True),
    Action("mark", "space", "mark", "Mark the run for a comparison.", ("home",)),
    Action("compare", "c", "compare", "Lay the marked runs over each other.", ("home",)),
    Action("sort", "s", "sort", "Sort by the next column.", ("home",)),
    Action("reverse", "r", "reverse", "Turn the order round.", ("home",), footer=False),
    Action(
        "filter",
        "slash",
        "filter",
        "Show only what has this text (Home: or model:…, verdict:fail, date:7d); empty shows all.",
        ("home", *DASHBOARDS),
    ),
    Action("hosts", "h", "hosts", "See the hosts: trust them, make them ready, check them.", ("home",)),
    Action("refresh", "ctrl+r", "refresh", "Read the directories again.", ("home",), footer=False),
    # Run
    Action("stop", "s", "stop…", "Stop the run, after a question; it commits what it has.", ("run",), True),
    Action("next_pane", "tab", "panes", "Go to the next pane.", (*DASHBOARDS, "compare")),
    Action(
        "previous_pane", "shift+tab", "previous pane", "Go to the pane before.", (*DASHBOARDS, "compare"), footer=False
    ),
    Action(
        "pane_1",
        "1",
        "loss",
        "Show the loss chart, again: the teacher agreement; of an evaluation its score.",
        DASHBOARDS,
        footer=False,
    ),
    Action("pane_2", "2", "verdicts", "Show the falsifiers.", DASHBOARDS, footer=False),
    Action("pane_3", "3", "checkpoints", "Show the checkpoint timeline.", DASHBOARDS, footer=False),
    Action("pane_4", "4", "projection", "Show the projection.", DASHBOARDS, footer=False),
    Action("pane_5", "5", "host", "Show the host's vitals.", DASHBOARDS, footer=False),
    Action("pane_6", "6", "log", "Show the log.", DASHBOARDS, footer=False),
    Action("full_screen", "z", "zoom pane", "Give the whole screen to the pane that has the focus.", DASHBOARDS),
    Action("follow", "f", "follow", "Log and chart: follow what arrives.", DASHBOARDS),
    Action("page", "p", "page", "Chart: losses, or agreement with the teacher.", DASHBOARDS, footer=False),
    Action("log_y", "l", "log y", "Chart: logarithmic or linear y.", (*DASHBOARDS, "compare")),
    Action("axis", "x", "x axis", "Chart: steps or wall time on x.", (*DASHBOARDS, "compare")),
    Action("smooth_more", "plus,equals_sign", "smoother", "Chart: more smoothing.", (*DASHBOARDS, "compare")),
    Action("smooth_less", "minus", "rougher", "Chart: less smoothing.", (*DASHBOARDS, "compare")),
    Action("zoom_in", "i", "zoom in", "Chart: look closer at the cursor.", (*DASHBOARDS, "compare"), footer=False),
    Action("zoom_out", "o", "zoom out", "Chart: look from further away.", (*DASHBOARDS, "compare"), footer=False),
    Action("reset", "0", "reset", "Chart: everything as it was at first; the present again.", (*DASHBOARDS, "compare")),
    Action("scrub_back", "left_square_bracket", "earlier", "Show the run as it was earlier.", DASHBOARDS),
    Action("scrub_forward", "right_square_bracket", "later", "Show the run as it was later.", DASHBOARDS),
    Action("search", "ctrl+f", "search", "Log: look for a text.", DASHBOARDS, footer=False),
    Action("next_match", "n", "next match", "Log: the next line with the text searched for.", DASHBOARDS, footer=False),
    Action("previous_match", "shift+n,N", "previous match", "Log: the line with it before.", DASHBOARDS, footer=False),
    Action("export", "e", "export", "Write the pane's data or picture to a file.", (*DASHBOARDS, "compare"), True),
    Action("copy", "y", "copy", "Copy what the focused pane shows to the clipboard.", (*DASHBOARDS, "compare")),
    Action("play", "space", "play", "Play the run from the moment shown, or from its beginning; or stop.", DASHBOARDS),
    Action("slower", "less_than_sign", "slower", "Play slower, down to 1x.", DASHBOARDS),
    Action("faster", "greater_than_sign", "faster", "Play faster, up to 1,000x.", DASHBOARDS),
    Action("to_start", "left_curly_bracket", "start", "Show the run at its beginning.", DASHBOARDS, footer=False),
    Action("to_end", "right_curly_bracket", "end", "Show the latest of the run.", DASHBOARDS, footer=False),
    Action("fetch", "g", "fetch…", "Bring checkpoints and the model here from the run's host.", ("run",), True),
    Action(
        "resume",
        "r",
        "resume…",
        "Go on with a training or an evaluation that was stopped or broke.",
        ("run",),
        True,
        footer=False,
    ),
    # New run
    Action("start", "enter,ctrl+j,ctrl+enter", "start", "Start the run once its checks have passed.", ("new",), True),
    Action("mode", "m", "mode", "Smoke for a minute, train to the last step, or store the teacher.", ("new",)),
    Action("host", "h", "host", "Run it on this machine, or on the next host.", ("new",)),
    Action("overrides", "o", "set", "Go to the line that sets single keys of the configuration.", ("new",)),
    Action("details", "v", "details", "Go to checks, room and values, to scroll them; again: back.", ("new",)),
    Action("check_again", "ctrl+r", "check again", "Read files, memory and disk again.", ("new",), footer=False),
    # Hosts
    Action(
        "preflight", "enter,p", "pre-flight", "Connect to the host and say whether a run can start there.", ("hosts",)
    ),
    Action("trust", "t", "trust…", "See the host's key and trust it, after a question.", ("hosts",), True),
    Action(
        "bootstrap", "b", "bootstrap", "Make the host's Python environment and put the engine there.", ("hosts",), True
    ),
    Action("clean", "c", "clean…", "Remove old runs and leftovers from the host, after a question.", ("hosts",), True),
    Action("read_again", "ctrl+r", "read again", "Read hosts.yaml and the known keys again.", ("hosts",), footer=False),
    # Dialogs
    Action("close", "escape,q,question_mark,f1", "close", "Close the help.", ("help",)),
    Action("yes", "y", "yes", "Do it. Enter does it too, once Yes has the focus.", ("confirm",)),
    Action("no", "n,escape", "no", "Do not; nothing changes.", ("confirm",)),
    Action("take", "enter", "take", "Take what the cursor stands on.", ("choose",)),
    Action("cancel", "escape,q", "cancel", "Take none of it; nothing changes.", ("choose",)),
)


def actions_of(where: Where) -> tuple[Action, ...]:
    """What can be done on a screen, its own actions first, then those of the app."""
    own = tuple(a for a in ACTIONS if where in a.where)
    return own if where == "app" or where in DIALOGS else (*own, *(a for a in ACTIONS if "app" in a.where))


def named(name: str) -> Action:
    """The action of this name."""
    return next(a for a in ACTIONS if a.name == name)


def binding_id(action: Action, where: Where) -> str:
    """How a key map names an action on a screen, such as `home.sort`; one of the app is `app.…` on all of them."""
    return f"{'app' if 'app' in action.where else where}.{action.name}"


def keys_of(action: Action, where: Where, keymap: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of an action on a screen, a user's own where the key map has some."""
    return tuple(key.strip() for key in keymap.get(binding_id(action, where), action.keys).split(","))


def bindings(where: Where) -> list[BindingType]:
    """The bindings of one screen, or of the app; a user's key map finds them by the action's name."""
    return [
        Binding(a.keys, a.name, a.label, show=a.footer, tooltip=a.help, id=f"{where}.{a.name}")
        for a in ACTIONS
        if where in a.where
    ]
