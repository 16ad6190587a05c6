"""Write a round's report page."""

from sera_core.artifacts.step import Attempt
from sera_core.reporting.round_page import round_page


def report_round(attempt: Attempt) -> list[str]:
    """Write report.html: the round's data, metrics, decision and evidence on one page."""
    artifacts = {role: attempt.input(role) for role in attempt.spec.inputs}
    page = round_page(attempt.fields["round"], artifacts)
    attempt.write("report.html").write_text(page, encoding="utf-8", newline="\n")
    return ["report.html"]
