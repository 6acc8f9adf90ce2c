"""Jinja filters over the pure functions of plugin_utils."""

from __future__ import annotations

from ansible_collections.dengine.core.plugins.plugin_utils import plan, report


class FilterModule:
    def filters(self):
        return {
            "topology": plan.topology,
            "inventory_problems": plan.inventory_problems,
            "expansion_plan": plan.expansion_plan,
            "host_rows": plan.host_rows,
            "way_rows": plan.way_rows,
            "skipping": plan.skipping,
            "verdict": plan.verdict,
            "failures": plan.failures,
            "table": plan.table,
            "markdown": report.markdown,
            "phases": report.phases,
        }
