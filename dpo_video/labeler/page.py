"""Labels from people, in the browser."""

from __future__ import annotations

import getpass
import secrets
import webbrowser
from typing import ClassVar, final

from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_video.errors import UserError
from dpo_video.labeler._page.session import LabelSession, Summary
from dpo_video.strategies import LabelTask, StoreLabeler
from dpo_video.support.formatting import plain_table


@final
class Page(StoreLabeler):
    """A web page: people compare both videos segment by segment on a local page.

    As in DenseDPO (Wu et al. 2025, arXiv 2506.03517). The comparison is blind: sides are random and
    unmarked. Every answer is saved before the next question. Several people may label the same set,
    at once or in turn; their agreement is reported, and training uses their vote.
    """

    incidental: ClassVar[frozenset[str]] = frozenset({"port", "rater", "browser"})

    seed: int = 0
    """Seed of the order of the pairs and of the sides."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the page, on 127.0.0.1 only; 0 takes any free port."""
    rater: str = ""
    """Name that the page suggests; the login name if empty."""
    browser: bool = True
    """Open the page in a browser; the link is always printed."""

    def label_store(self, task: LabelTask) -> None:
        """Serve the page until a rater ends the session or a signal stops it, such as Ctrl-C."""
        try:
            from dpo_video.labeler._page.server import LOOPBACK, listen, serve
        except ModuleNotFoundError as error:
            raise UserError(
                f"The labelling page needs {error.name}. Install it: pip install 'dpo-video[page]'."
            ) from error
        console = Console(stderr=True)
        session = LabelSession(task, self.seed)
        token = secrets.token_urlsafe(16)
        with listen(self.port) as listener:
            port = listener.getsockname()[1]
            url = f"http://{LOOPBACK}:{port}/{token}/"
            console.print("Open this link to label (it works on this machine only):")
            console.print(f"  {url}", style="bold", soft_wrap=True, highlight=False)
            console.print(
                "Every answer is saved at once. Ctrl-C stops; the same command resumes.\n"
                f"From another machine: ssh -L {port}:{LOOPBACK}:{port} THIS-MACHINE, same link.",
                style="dim",
                highlight=False,
            )
            if self.browser:
                webbrowser.open(url)
            try:
                serve(session, listener, token, suggested=self.rater or _login())
            finally:
                for rater in session.present():
                    console.print(summary_table(session.summary(rater)))


def summary_table(summary: Summary) -> Table:
    """A rater's summary, for the terminal."""
    counts = ", ".join(f"{count} {answer}" for answer, count in summary.answers.items())
    pace = f", {summary.pace:.0f} pairs an hour" if summary.pace else ""
    rows = [
        ("pairs finished", f"{summary.finished} of {summary.total}"),
        ("segments, as shown", counts),
        ("this session", f"{summary.minutes:.0f} min of work{pace}"),
    ]
    title = Text(f"Labels by {summary.rater}", "table.title")
    return plain_table(("", ""), rows, title=title, title_justify="left", show_header=False)


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no login name, as in some containers
        return ""
