"""Jinja filters over the pure functions of plugin_utils."""

from __future__ import annotations

import os

from ansible_collections.dengine.core.plugins.plugin_utils import inventory, plan, report, rows


def file_mode(path):
    """The permissions of a file on the controller; None where there is none."""
    try:
        return os.stat(path).st_mode & 0o7777
    except FileNotFoundError:
        return None


class FilterModule:
    def filters(self):
        return {
            "file_mode": file_mode,
            "topology": inventory.topology,
            "observed": inventory.observed,
            "inventory_problems": inventory.inventory_problems,
            "expansion_plan": plan.expansion_plan,
            "host_rows": rows.host_rows,
            "way_rows": rows.way_rows,
            "release_rows": rows.release_rows,
            "secret_rows": rows.secret_rows,
            "security_rows": rows.security_rows,
            "skipping": rows.skipping,
            "verdict": rows.verdict,
            "failures": rows.failures,
            "table": rows.table,
            "markdown": report.markdown,
            "phases": report.phases,
        }
