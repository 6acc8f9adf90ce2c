"""Every guard of what expand.yml goes through: what it is, what stands there when it is gone, and
the test that then fails.
"""

from __future__ import annotations

from typing import NamedTuple


class Guard(NamedTuple):
    file: str
    text: str
    instead: str
    test: str


def of(file: str, tests: str, *found: tuple[str, str, str]) -> list[Guard]:
    return [Guard(file, text, instead, f"{tests}::{test}") for text, instead, test in found]


PURE = [
    *of(
        "plugins/plugin_utils/inventory.py",
        "test_plan.py",
        (
            'if options.get("limit") not in (None, "", "all"):',
            "if False:",
            "test_each_guard_of_the_gate",
        ),
        ("target < 1 or target % 2 == 0", "target < 1", "test_each_guard_of_the_gate"),
        ("target is None or target < 1 or", "target is None or", "test_each_guard_of_the_gate"),
        (
            "if target is None or target < 1 or target % 2 == 0:",
            "if target is not None and (target < 1 or target % 2 == 0):",
            "test_each_guard_of_the_gate",
        ),
        ("if target > len(nodes):", "if False:", "test_each_guard_of_the_gate"),
        ('if options.get("target") is None:', "if False:", "test_what_is_meant_is_let_through"),
        (
            "node_id is None or not 1 <= node_id <= MAX_NODE_ID",
            "node_id is None",
            "test_each_guard_of_the_gate",
        ),
        (
            "node_id is None or not 1 <= node_id",
            "node_id is not None and not 1 <= node_id",
            "test_each_guard_of_the_gate",
        ),
        (
            "elif ids.setdefault(node_id, host) != host:",
            "elif False:",
            "test_each_guard_of_the_gate",
        ),
        (
            'problems.append(f"{host}: dengine_address is missing: the address that peers dial")',
            "pass",
            "test_each_guard_of_the_gate",
        ),
        ('elif address in ("0.0.0.0", "::"):', "elif False:", "test_each_guard_of_the_gate"),
        ("elif not local and (", "elif False and (", "test_each_guard_of_the_gate"),
        ("elif not local and (", "elif (", "test_what_is_meant_is_let_through"),
        (
            'elif endpoints.setdefault(node["endpoint"], host) != host:',
            "elif False:",
            "test_each_guard_of_the_gate",
        ),
        (
            'if node["port"] is not None and not 1 <= node["port"] <= 65535:',
            "if False:",
            "test_each_guard_of_the_gate",
        ),
        ("if zone not in used:", "if False:", "test_each_guard_of_the_gate"),
        ('for host in used.pop("", []):', "for host in ():", "test_each_guard_of_the_gate"),
        ("if 1 < target == len(nodes) and", "if False and", "test_each_guard_of_the_gate"),
        (' and not options.get("shared_zones"):', ":", "test_what_is_meant_is_let_through"),
        ('if str(value).rstrip("/") != unit:', "if False:", "test_each_guard_of_the_gate"),
        (
            'problems += _config_problems(options.get("config") or {})',
            "pass",
            "test_each_guard_of_the_gate",
        ),
        (
            "if not isinstance(config, dict):",
            "if False:",
            "test_configuration_that_follows_from_the_inventory_is_refused",
        ),
        (
            "if not isinstance(values, dict):",
            "if False:",
            "test_configuration_that_follows_from_the_inventory_is_refused",
        ),
        (
            "if value and (len(value) < MIN_SECRET or",
            "if value and (",
            "test_a_short_secret_is_refused",
        ),
        (
            "if token and token == (",
            "if False and token == (",
            "test_secrets_that_are_the_same_are_refused_before_they_are_written",
        ),
        (
            "    if no_text:",
            "    if False:",
            "test_a_secret_that_yaml_takes_for_something_else_is_to_be_quoted",
        ),
        ("if mode is not None and mode & 0o077:", "if False:", "test_each_guard_of_the_gate"),
    ),
    *of(
        "plugins/plugin_utils/faults.py",
        "test_plan.py",
        (
            "in survey.unreachable.items()",
            "in {}.items()",
            "test_a_host_that_cannot_be_reached_is_a_row_and_decides_nothing",
        ),
        (
            'if node["host"] not in survey.unreachable:',
            "if True:",
            "test_a_host_that_cannot_be_reached_is_a_row_and_decides_nothing",
        ),
        (
            "    found += _secrets(survey, options)",
            "    pass",
            "test_secrets_that_only_the_hosts_have_are_not_replaced",
        ),
        (
            'if options.get("secrets", True):',
            "if True:",
            "test_secrets_that_only_the_hosts_have_are_not_replaced",
        ),
        (
            "holders += [h for h in hosts if survey.belongs(h)]",
            "pass",
            "test_secrets_that_only_the_hosts_have_are_not_replaced",
        ),
        (
            'if not any(r["check"] == "secrets" for r in found):',
            "if True:",
            "test_secrets_that_only_the_hosts_have_are_not_replaced",
        ),
        ('if identity.get("error"):', "if False:", "test_what_stops_a_run"),
        ('elif identity.get("removed"):', "elif False:", "test_what_stops_a_run"),
        (
            'elif identity and identity.get("node_id") != node_id:',
            "elif False:",
            "test_what_stops_a_run",
        ),
        (
            'elif survey.view and survey.belongs(host) not in ("", survey.view["cluster_id"]):',
            "elif False:",
            "test_what_stops_a_run",
        ),
        (
            'elif any(m["status"] == "active" for m in own) and not _is_known(identity, own):',
            "elif False:",
            "test_a_lost_first_host_founds_no_second_cluster",
        ),
        (
            'return bool(mine) and any(int(m["incarnation"], 16) == int(mine, 16) for m in own)',
            "return bool(mine)",
            "test_what_stops_a_run",
        ),
        (
            "elif survey.view and node is survey.nodes[0] and not own and not",
            "elif False and not",
            "test_what_stops_a_run",
        ),
        (
            "            found += _other(survey, node)",
            "            pass",
            "test_another_node_at_an_address_stops_a_run",
        ),
        (
            "    elif survey.halted(host):",
            "    elif False:",
            "test_a_directory_that_is_not_to_be_used_is_not_started",
        ),
        (
            '    found += [r for r in _ended(survey, options) if r["host"] not in known]',
            "    pass",
            "test_a_node_that_ended_right_after_its_start_is_a_row",
        ),
        (
            "if verified and known and verified != known:",
            "if False:",
            "test_another_cluster_than_the_verified_one_is_not_taken_for_it",
        ),
        ("    if len(found) > 1:", "    if False:", "test_what_stops_a_run"),
        (
            "    if founder:\n",
            "    if True:\n",
            "test_an_earlier_cluster_whose_data_are_gone_is_not_replaced_by_a_new_one",
        ),
        (
            "        found += _lost(survey)",
            "        pass",
            "test_an_earlier_cluster_whose_data_are_gone_is_not_replaced_by_a_new_one",
        ),
        (
            'found += [r for r in _silent(survey) if r["host"] not in known]',
            "pass",
            "test_a_voter_that_does_not_answer_stops_a_run",
        ),
        (
            'if process and not said.get("status"):',
            "if False:",
            "test_a_voter_that_does_not_answer_stops_a_run",
        ),
        ("        if host is None:", "        if False:", "test_what_stops_a_run"),
        (
            'and member["ready"] is False',
            "and False",
            "test_a_voter_that_does_not_answer_stops_a_run",
        ),
        (
            "            and host not in {*start, *known}\n",
            "",
            "test_members_that_stopped_with_their_data_are_started",
        ),
        ('if survey.view.get("joint"):', "if False:", "test_what_stops_a_run"),
        ("        found += _leaderless(survey)", "        pass", "test_what_stops_a_run"),
        (
            "if not (survey.view or start or found):",
            "if True:",
            "test_a_cluster_that_is_as_it_should_be_is_left_alone",
        ),
    ),
    *of(
        "plugins/plugin_utils/plan.py",
        "test_plan.py",
        (
            "if survey.view or survey.unreachable or not self.nodes:",
            "if survey.view or not self.nodes:",
            "test_a_host_that_cannot_be_reached_is_a_row_and_decides_nothing",
        ),
        (
            "if survey.view or survey.unreachable or not self.nodes:",
            "if survey.unreachable or not self.nodes:",
            "test_a_lost_first_host_founds_no_second_cluster",
        ),
        (
            '            and not survey.halted(n["host"])\n',
            "",
            "test_a_directory_that_is_not_to_be_used_is_not_started",
        ),
        (
            'if any(survey.belongs(n["host"]) for n in self.nodes):',
            "if False:",
            "test_a_lost_first_host_founds_no_second_cluster",
        ),
        (
            "and len(chosen) < self.target",
            'and (len(chosen) < self.target or node["id"] in survey.learners)',
            "test_learners_become_voters_only_where_the_target_has_room",
        ),
        (
            ' and node["id"] not in survey.readers',
            "",
            "test_a_read_only_member_neither_joins_nor_votes",
        ),
        (
            'max(target, len(survey.voters)) if mode == "site" else target',
            "target",
            "test_the_zones_of_the_chosen_nodes_count_whatever_is_to_spare",
        ),
        (
            'and not survey.process(n["host"])',
            "and True",
            "test_a_cluster_that_is_as_it_should_be_is_left_alone",
        ),
        (
            '            and (not survey.view or n["id"] in {*survey.voters, *survey.readers})\n',
            "",
            "test_learners_become_voters_only_where_the_target_has_room",
        ),
        (
            'if n["host"] not in self.survey.unreachable]',
            "if True]",
            "test_a_host_that_cannot_be_reached_is_a_row_and_decides_nothing",
        ),
        (
            '            and survey.process(n["host"])\n            and n["host"] not in',
            '            and n["host"] not in',
            "test_a_follower_that_runs_makes_the_backup",
        ),
        ('if n["id"] != survey.leader]', "if True]", "test_a_follower_that_runs_makes_the_backup"),
        ("if len(survey.voters) > self.target:", "if False:", "test_growing_does_not_shrink"),
        (
            "elif voters < self.target:",
            "elif False:",
            "test_a_read_only_member_neither_joins_nor_votes",
        ),
        (
            "elif survey.view and voters % 2 == 0:",
            "elif False:",
            "test_an_even_number_of_voters_is_never_the_target",
        ),
        (
            "for problem in crowded_zones(members, voters):",
            "for problem in ():",
            "test_the_zones_of_the_chosen_nodes_count_whatever_is_to_spare",
        ),
        (
            ' and not self.options.get("shared_zones"):',
            ":",
            "test_the_zones_of_the_chosen_nodes_count_whatever_is_to_spare",
        ),
        (
            'and (grows or self.mode == "expand") and',
            "and",
            "test_the_zones_of_the_chosen_nodes_count_whatever_is_to_spare",
        ),
    ),
    *of(
        "plugins/plugin_utils/rows.py",
        "test_plan.py",
        (
            "                not broken,",
            "                True,",
            "test_ways_are_judged_in_both_directions",
        ),
        (
            "                        worst <= limit,",
            "                        True,",
            "test_ways_are_judged_in_both_directions",
        ),
        (
            'offsets.append((abs(way["offset_ms"]), other))',
            'offsets.append((way["offset_ms"], other))',
            "test_ways_are_judged_in_both_directions",
        ),
        (
            'r["check"] == "firewall" and r["status"]',
            'r["status"]',
            "test_who_is_reached_by_all_others_has_no_firewall_in_the_way",
        ),
        (
            ' and r["host"] in reached\n',
            "\n",
            "test_who_is_reached_by_all_others_has_no_firewall_in_the_way",
        ),
        (
            "return bool(tries) and",
            "return",
            "test_who_is_reached_by_all_others_has_no_firewall_in_the_way",
        ),
        (
            'and not any(way["error"] for way in tries)',
            "",
            "test_who_is_reached_by_all_others_has_no_firewall_in_the_way",
        ),
        ("(version or coming) == limit,", "True,", "test_a_joiner_gets_the_release_of_the_members"),
        (
            "(version or coming) == limit,",
            "not version or version == limit,",
            "test_a_joiner_gets_the_release_of_the_members",
        ),
        (
            "                not others,",
            "                True,",
            "test_secrets_of_another_run_are_a_failure_and_missing_ones_are_not",
        ),
        (
            'if found.get("process") and found.get("security") is not None',
            'if found.get("security") is not None',
            "test_security_of_a_running_node_is_neither_switched_on_nor_off",
        ),
        (
            'found["security"] == wanted,',
            "True,",
            "test_security_of_a_running_node_is_neither_switched_on_nor_off",
        ),
        (
            "if not (any(digests) and in_use):",
            "if not in_use:",
            "test_secrets_of_another_run_are_a_failure_and_missing_ones_are_not",
        ),
        (
            "if there and there != here]",
            "if there != here]",
            "test_secrets_of_another_run_are_a_failure_and_missing_ones_are_not",
        ),
        (' and r["check"] in skip else r', " else r", "test_ways_are_judged_in_both_directions"),
        (
            'if r["status"] == "FAILED" and r["check"] in skip',
            'if r["check"] in skip',
            "test_only_a_failure_is_skipped",
        ),
        (
            'return [r for r in rows if r["status"] == "FAILED"]',
            "return []",
            "test_ways_are_judged_in_both_directions",
        ),
    ),
    *of(
        "plugins/module_utils/checks.py",
        "test_checks.py",
        (
            "if not least <= have <= most:",
            "if not least <= have:",
            "test_a_python_of_another_version_or_without_venv",
        ),
        (
            "if not least <= have <= most:",
            "if not have <= most:",
            "test_a_python_of_another_version_or_without_venv",
        ),
        (
            "        if code:\n",
            "        if False:\n",
            "test_a_python_of_another_version_or_without_venv",
        ),
        (
            "return have in ARCHITECTURES, have",
            "return True, have",
            "test_a_machine_for_which_there_are_no_wheels",
        ),
        (
            'if not os.path.isdir("/run/systemd/system"):',
            "if False:",
            "test_a_systemd_that_is_too_old_or_does_not_run",
        ),
        (
            "return int(have) >= need, have",
            "return True, have",
            "test_a_systemd_that_is_too_old_or_does_not_run",
        ),
        ("if not code and len", "if len", "test_a_systemd_that_is_too_old_or_does_not_run"),
        ('return uid == 0, f"uid', 'return True, f"uid', "test_who_is_not_root_may_not_install"),
        (
            'params, have >= need, f"{have} MB free"',
            'params, True, f"{have} MB free"',
            "test_too_little_memory",
        ),
        (
            "return unlimited or hard >= need, shown",
            "return True, shown",
            "test_too_few_open_files",
        ),
        (
            'return have >= need, f"{have} MB at',
            'return True, f"{have} MB at',
            "test_too_small_a_disk",
        ),
        ("need = max(least, times * data)", "need = least", "test_too_small_a_disk"),
        ("need = max(least, times * data)", "need = times * data", "test_too_small_a_disk"),
        ("bad = kind in VOLATILE or", "bad =", "test_a_disk_that_is_none"),
        (
            "bad = kind in VOLATILE or kind in NETWORK_FS",
            "bad = kind in VOLATILE",
            "test_a_disk_that_is_none",
        ),
        (
            "params, p99 <= need, shown",
            "params, True, shown",
            "test_a_slow_disk_or_none_to_write_to",
        ),
        (
            'return False, "no directory to write in"',
            'return True, "no directory to write in"',
            "test_a_slow_disk_or_none_to_write_to",
        ),
        (
            "synced = state >= 0 and not status & STA_UNSYNC",
            "synced = state >= 0",
            "test_a_clock_that_nothing_keeps_right",
        ),
        ("synced = state >= 0 and", "synced =", "test_a_clock_that_nothing_keeps_right"),
        (
            'return False, f"{number} is taken by',
            'return True, f"{number} is taken by',
            "test_a_port_that_somebody_else_has",
        ),
        (
            'return False, f"{endpoint} is not of',
            'return True, f"{endpoint} is not of',
            "test_a_port_that_somebody_else_has",
        ),
        (
            "or network.stand_in_pid(endpoint) is not None:",
            ":",
            "test_a_port_that_somebody_else_has",
        ),
        (
            'outcome = (False, f"could not',
            'outcome = (True, f"could not',
            "test_what_cannot_be_checked_is_no_success",
        ),
        ('"status": "ok" if ok else "FAILED"', '"status": "ok"', "test_too_little_memory"),
    ),
    *of(
        "plugins/module_utils/checks.py",
        "test_firewall.py",
        ('return opened, f"stops', 'return True, f"stops', "test_the_row_of_a_host"),
        ("if unread and not opened:", "if False:", "test_the_row_of_a_host"),
    ),
    *of(
        "plugins/modules/dengine_member.py",
        "test_member_and_lock.py",
        ("if len(after) % 2 == 0:", "if False:", "test_member_never_makes_the_voters_even"),
    ),
    *of(
        "plugins/modules/dengine_member.py",
        "test_member_and_lock.py",
        (
            'if expected and view["cluster_id"] != expected:',
            "if False:",
            "test_member_refuses_another_cluster",
        ),
    ),
    *of(
        "plugins/modules/dengine_snapshot.py",
        "test_modules.py",
        (
            "if sha256(self._file) != self._sha256:",
            "if False:",
            "test_snapshot_that_arrives_damaged_is_no_backup",
        ),
    ),
    *of(
        "plugins/action/dengine_fetch.py",
        "test_backup.py",
        (
            "if not _is(partial, size, wanted):",
            "if False:",
            "test_a_file_that_arrives_damaged_never_gets_its_name",
        ),
    ),
    *of(
        "plugins/modules/dengine_lock.py",
        "test_member_and_lock.py",
        (
            'if not holder or mine or taken or params["force"]:',
            "if True:",
            "test_lock_has_one_holder_who_says_how_long_it_may_be_silent",
        ),
    ),
    *of(
        "plugins/modules/dengine_verify.py",
        "test_verify_module.py",
        (
            'if view["cluster_id"] != first["cluster_id"]:',
            "if False:",
            "test_each_fault_of_the_membership_is_a_problem",
        ),
        (
            "if voters(view) != sorted(wanted):",
            "if False:",
            "test_each_fault_of_the_membership_is_a_problem",
        ),
        (
            '        if view["joint"]:',
            "        if False:",
            "test_each_fault_of_the_membership_is_a_problem",
        ),
        (
            'if member["status"] == "active" and member["ready"] is False:',
            "if False:",
            "test_each_fault_of_the_membership_is_a_problem",
        ),
        (
            'if first["fault_tolerance"] < tolerance:',
            "if False:",
            "test_each_fault_of_the_membership_is_a_problem",
        ),
        (
            "    if count % 2 == 0:",
            "    if False:",
            "test_each_fault_of_the_membership_is_a_problem",
        ),
        (
            'if zone is not None and member["zone"] != zone:',
            "if False:",
            "test_each_fault_of_the_zones_is_a_problem",
        ),
        (
            "len(ids) > max(1, (count - 1) // 2)",
            "False",
            "test_each_fault_of_the_zones_is_a_problem",
        ),
    ),
    *of(
        "roles/gate/tasks/main.yml",
        "test_role_guards.py",
        (
            "that: ansible_version.full is version('2.17.0', '>=')",
            "that: true",
            "test_an_older_ansible_is_refused",
        ),
        (
            "that: gate_problems | length == 0",
            "that: true",
            "test_the_gate_asks_for_everything_that_may_be_wrong",
        ),
        (
            "'target': gate_target",
            "'target': none",
            "test_the_gate_asks_for_everything_that_may_be_wrong",
        ),
        (
            "'limit': ansible_limit | default('')",
            "'limit': ''",
            "test_the_gate_asks_for_everything_that_may_be_wrong",
        ),
        (
            "'zones': dengine_zones",
            "'zones': []",
            "test_the_gate_asks_for_everything_that_may_be_wrong",
        ),
        (
            "'config': dengine_config",
            "'config': {}",
            "test_the_gate_asks_for_everything_that_may_be_wrong",
        ),
        (
            "'paths': {} if dengine_is_process else gate_paths",
            "'paths': {}",
            "test_the_gate_asks_for_everything_that_may_be_wrong",
        ),
        (
            "'peer_secret': dengine_peer_secret",
            "'peer_secret': ''",
            "test_the_gate_asks_for_everything_that_may_be_wrong",
        ),
        (
            "'token': dengine_token",
            "'token': ''",
            "test_the_gate_asks_for_everything_that_may_be_wrong",
        ),
        (
            "'secrets_file': [dengine_secrets_file, dengine_secrets_file | dengine.core.file_mode]",
            "'secrets_file': none",
            "test_the_gate_looks_at_the_file_of_the_secrets",
        ),
        ("when: gate_lock | bool", "when: false", "test_only_who_has_the_run_lock_goes_on"),
    ),
    *of(
        "roles/gate/tasks/hold.yml",
        "test_role_guards.py",
        (
            "that: gate_locked.held | default(false)",
            "that: true",
            "test_only_who_has_the_run_lock_goes_on",
        ),
    ),
    *of(
        "roles/preflight/tasks/main.yml",
        "test_role_guards.py",
        (
            "that: preflight_failures | length == 0",
            "that: true",
            "test_every_kind_of_row_is_collected_and_one_failure_is_enough",
        ),
        (
            "{{ (discover_plan.problems + ",
            "{{ (",
            "test_every_kind_of_row_is_collected_and_one_failure_is_enough",
        ),
        (
            " + discover_plan.goal_problems + ",
            " + ",
            "test_every_kind_of_row_is_collected_and_one_failure_is_enough",
        ),
        (
            " + preflight_of_hosts + ",
            " + ",
            "test_every_kind_of_row_is_collected_and_one_failure_is_enough",
        ),
        (
            " + preflight_of_ways + ",
            " + ",
            "test_every_kind_of_row_is_collected_and_one_failure_is_enough",
        ),
        (
            " + preflight_of_releases + ",
            " + ",
            "test_every_kind_of_row_is_collected_and_one_failure_is_enough",
        ),
        (
            " + preflight_of_security + preflight_of_secrets)",
            ")",
            "test_every_kind_of_row_is_collected_and_one_failure_is_enough",
        ),
    ),
    *of(
        "roles/rollout/tasks/guard.yml",
        "test_role_guards.py",
        (
            "that: rollout_marks | default([])",
            "that: true or rollout_marks | default([])",
            "test_no_step_is_left_out",
        ),
    ),
    *of(
        "roles/rollout/tasks/backup.yml",
        "test_role_guards.py",
        (
            "ansible.builtin.import_tasks: guard.yml",
            "ansible.builtin.debug:",
            "test_each_step_begins_with_a_look_at_those_before",
        ),
    ),
    *of(
        "roles/rollout/tasks/install.yml",
        "test_role_guards.py",
        (
            "ansible.builtin.import_tasks: guard.yml",
            "ansible.builtin.debug:",
            "test_each_step_begins_with_a_look_at_those_before",
        ),
    ),
    *of(
        "roles/rollout/tasks/begin.yml",
        "test_role_guards.py",
        (
            "ansible.builtin.import_tasks: guard.yml",
            "ansible.builtin.debug:",
            "test_each_step_begins_with_a_look_at_those_before",
        ),
    ),
    *of(
        "roles/rollout/tasks/join.yml",
        "test_role_guards.py",
        (
            "ansible.builtin.import_tasks: guard.yml",
            "ansible.builtin.debug:",
            "test_each_step_begins_with_a_look_at_those_before",
        ),
    ),
    *of(
        "roles/rollout/tasks/finish.yml",
        "test_role_guards.py",
        (
            "ansible.builtin.import_tasks: guard.yml",
            "ansible.builtin.debug:",
            "test_each_step_begins_with_a_look_at_those_before",
        ),
    ),
    *of(
        "roles/rollout/tasks/backup.yml",
        "test_role_guards.py",
        (
            "when: discover_plan.join | length > 0 and discover_plan.voters | length > 0",
            "when: false",
            "test_a_backup_comes_before_voters_get_company",
        ),
    ),
    *of(
        "roles/rollout/defaults/main.yml",
        "test_role_guards.py",
        (
            "     and rollout_first.voters | length == 0 and",
            "     and",
            "test_voters_that_were_stopped_are_backed_up_once_they_run",
        ),
        (
            "     and rollout_first.voters | length == 0 and",
            "     and false and",
            "test_voters_that_were_stopped_are_backed_up_once_they_run",
        ),
        (
            " and rollout_first.founder | length == 0 }}",
            " }}",
            "test_voters_that_were_stopped_are_backed_up_once_they_run",
        ),
    ),
    *of(
        "roles/node/templates/dengine.toml.j2",
        "test_role_guards.py",
        (
            "node.host == node_founder == inventory_hostname",
            "loop.first",
            "test_only_who_founds_has_a_file_that_founds",
        ),
        ("dengine_nodes | length == 1 or ", "", "test_only_who_founds_has_a_file_that_founds"),
    ),
    *of(
        "roles/rollout/tasks/finish.yml",
        "test_role_guards.py",
        (
            "    - discover_probe.facts.verified in ['', discover_plan.cluster_id]\n",
            "",
            "test_the_note_of_another_cluster_is_not_overwritten",
        ),
    ),
    *of(
        "roles/rollout/tasks/begin.yml",
        "test_role_guards.py",
        (
            "that: rollout_leader.message | default('') | length == 0",
            "that: rollout_leader is defined",
            "test_a_start_without_a_leader_ends_the_run",
        ),
        (
            "that: rollout_problems | length == 0",
            "that: true",
            "test_what_is_seen_after_the_start_is_judged_again",
        ),
        (
            "(discover_plan.problems + discover_plan.goal_problems)",
            "discover_plan.problems",
            "test_what_is_seen_after_the_start_is_judged_again",
        ),
        (
            "(discover_plan.problems + discover_plan.goal_problems)",
            "discover_plan.goal_problems",
            "test_what_is_seen_after_the_start_is_judged_again",
        ),
    ),
    *of(
        "roles/rollout/tasks/join.yml",
        "test_role_guards.py",
        (
            "that: discover_plan.target | length is not divisibleby 2",
            "that: true",
            "test_the_voters_to_be_are_never_even",
        ),
    ),
    *of(
        "roles/rollout/tasks/finish.yml",
        "test_role_guards.py",
        (
            "that: rollout_first.processes[inventory_hostname] is none or",
            "that: true or",
            "test_a_node_that_ran_is_the_same_process_at_the_end",
        ),
    ),
    *of(
        "roles/backup/tasks/main.yml",
        "test_role_guards.py",
        (
            "that: dengine_backup_same_disk | bool or backup_there != backup_here",
            "that: true",
            "test_a_backup_is_not_on_the_disk_that_it_is_of",
        ),
        (
            "[backup_destination.facts.machine, backup_destination.facts.data_device]",
            "[backup_destination.facts.machine]",
            "test_a_backup_is_not_on_the_disk_that_it_is_of",
        ),
    ),
    *of(
        "roles/verify/tasks/verdict.yml",
        "test_role_guards.py",
        (
            "that: verify_result.problems | length == 0",
            "that: true",
            "test_a_problem_of_the_verification_ends_the_run",
        ),
    ),
    *of(
        "roles/node/tasks/drift.yml",
        "test_role_guards.py",
        (
            "failed_when: node_drift is changed",
            "failed_when: false",
            "test_configuration_that_would_change_is_drift",
        ),
    ),
    *of(
        "roles/release/tasks/main.yml",
        "test_role_guards.py",
        (
            "- not release_link.stat.exists",
            "- true",
            "test_the_command_takes_nobodys_place_on_the_path",
        ),
    ),
]

IN_PLAYBOOKS = [
    *of(
        "plugins/action/dengine_lock.py",
        "test_member_and_lock.py",
        (
            'if alive is False or (alive is None and result.get("stale")):',
            "if True:",
            "test_lock_is_taken_from_who_has_ended_or_is_silent_elsewhere",
        ),
        (
            'if wanted and not result.get("held") and not result.get("failed"):',
            "if False:",
            "test_lock_is_taken_from_who_has_ended_or_is_silent_elsewhere",
        ),
    ),
    *of(
        "roles/gate/tasks/main.yml",
        "test_gate.py",
        (
            "that: gate_problems | length == 0",
            "that: gate_problems is defined",
            "test_the_gate_refuses_within_seconds_and_touches_no_host",
        ),
        (
            "when: gate_lock | bool",
            "when: false",
            "test_a_second_operator_is_refused_while_the_first_is_at_work",
        ),
    ),
    *of(
        "roles/preflight/tasks/main.yml",
        "test_gate.py",
        (
            "that: preflight_failures | length == 0",
            "that: preflight_failures is defined",
            "test_every_check_that_fails_is_a_row_of_one_table_and_nothing_is_changed",
        ),
    ),
    *of(
        "roles/rollout/tasks/guard.yml",
        "test_gate.py",
        (
            "that: rollout_marks | default([])",
            "that: true or rollout_marks | default([])",
            "test_the_gate_refuses_within_seconds_and_touches_no_host",
        ),
    ),
]
