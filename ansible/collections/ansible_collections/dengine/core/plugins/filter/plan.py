"""Jinja filters over the pure functions of plugin_utils."""

from __future__ import annotations

from ansible_collections.dengine.core.plugins.plugin_utils import inventory, plan, report, rows


class FilterModule:
    def filters(self):
        return {
            "topology": inventory.topology,
            "observed": inventory.observed,
            "inventory_problems": inventory.inventory_problems,
            "expansion_plan": plan.expansion_plan,
            "host_rows": rows.host_rows,
            "way_rows": rows.way_rows,
            "release_rows": rows.release_rows,
            "secret_rows": rows.secret_rows,
            "skipping": rows.skipping,
            "verdict": rows.verdict,
            "failures": rows.failures,
            "table": rows.table,
            "markdown": report.markdown,
            "phases": report.phases,
        }
