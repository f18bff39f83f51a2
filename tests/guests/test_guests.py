"""Broken and rude plugins: each is a status with its reason, and never takes nibs or another guest down.

Each test installs its guest beside a well-behaved one, `good`, and beside the backends of the environment.
"""

from __future__ import annotations

import textwrap

import pytest

NOTHING = "from nibs.hookspecs import hookimpl\n"

BROKEN = {
    "import_error": ("import a_module_that_nobody_has\n", "ModuleNotFoundError", "a_module_that_nobody_has"),
    "import_raises": ("raise RuntimeError('no such device here')\n", "RuntimeError", "no such device here"),
    "import_exits": ("import sys\nsys.exit('a guest wants to leave')\n", "SystemExit", "a guest wants to leave"),
    "syntax_error": ("def (:\n", "SyntaxError", ""),
    "hook_raises": (
        NOTHING + "@hookimpl\ndef nibs_backends():\n    raise OSError('libcudart.so is missing')\n",
        "OSError",
        "libcudart.so is missing",
    ),
    "hook_raises_halfway": (
        NOTHING + "@hookimpl\ndef nibs_backends():\n    yield from ()\n    raise KeyError('driver')\n",
        "KeyError",
        "driver",
    ),
    "hook_exits": (
        NOTHING + "@hookimpl\ndef nibs_backends():\n    raise SystemExit('gone')\n",
        "SystemExit",
        "gone",
    ),
    "hook_returns_a_number": (NOTHING + "@hookimpl\ndef nibs_backends():\n    return 7\n", "TypeError", "int"),
    "hook_returns_a_name": (NOTHING + "@hookimpl\ndef nibs_backends():\n    return ['cuda']\n", "TypeError", "str"),
    "hook_takes_unknown_argument": (
        NOTHING + "@hookimpl\ndef nibs_backends(weather):\n    return []\n",
        "PluginValidationError",
        "",
    ),
    "dir_raises": (
        NOTHING + "def __dir__():\n    raise RuntimeError('not to be listed')\n",
        "RuntimeError",
        "not to be listed",
    ),
    "wrong_type_of_name": (
        NOTHING + "from nibs.capabilities import BackendInfo, Capabilities\n@hookimpl\ndef nibs_backends():\n"
        "    yield BackendInfo(name=3, arrays=(), capabilities=Capabilities(), load=lambda: None)\n",
        "TypeError",
        "name",
    ),
    "arrays_as_one_string": (
        NOTHING + "from nibs.capabilities import BackendInfo, Capabilities\n@hookimpl\ndef nibs_backends():\n"
        "    yield BackendInfo(name='one', arrays='torch.Tensor', capabilities=Capabilities(), load=lambda: None)\n",
        "TypeError",
        "arrays",
    ),
    "no_capabilities": (
        NOTHING + "from nibs.capabilities import BackendInfo\n@hookimpl\ndef nibs_backends():\n"
        "    yield BackendInfo(name='none', arrays=(), capabilities=None, load=lambda: None)\n",
        "TypeError",
        "capabilities",
    ),
    "unknown_feature": (
        NOTHING + "from nibs.capabilities import BackendInfo, Capabilities\n@hookimpl\ndef nibs_backends():\n"
        "    Capabilities(features={'teleport'})\n    return []\n",
        "ValueError",
        "teleport",
    ),
    "hookimpl_forgotten": ("def nibs_backends():\n    return []\n", "", "hookimpl"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_guest_is_a_status_with_its_reason(guests, well_behaved, kind):
    source, exception, detail = BROKEN[kind]
    guests.add("nibs-bad", source, entry="bad", module="nibs_bad")
    guests.add("nibs-good", well_behaved("good"), entry="good", module="nibs_good")

    found = guests.look()

    assert found["bad"]["state"] == "broken"
    assert exception in found["bad"]["reason"]
    assert detail in found["bad"]["reason"]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_guest_leaves_the_others_as_they_were(guests, well_behaved, kind):
    guests.add("nibs-good", well_behaved("good"), entry="good", module="nibs_good")
    before = guests.look()
    guests.add("nibs-bad", BROKEN[kind][0], entry="bad", module="nibs_bad")

    after = guests.look()

    assert before.items() <= after.items()


def test_the_reason_is_one_line_and_names_the_distribution(guests):
    guests.add("nibs-bad", "raise RuntimeError('first line\\nsecond line')\n", entry="bad", module="nibs_bad")

    found = guests.look()["bad"]

    assert found["reason"] == "RuntimeError: first line"
    assert found["distribution"] == "nibs-bad 1.0"


def test_a_lazy_attribute_is_not_touched(guests, well_behaved):
    lazy = """
    def __dir__():
        return ["nibs_backends", "Kernels"]

    def __getattr__(name):
        raise ImportError(f"{name} would have loaded a framework")
    """
    guests.add("nibs-lazy", well_behaved("lazy") + textwrap.dedent(lazy), entry="lazy", module="nibs_lazy")

    assert guests.look()["lazy"]["state"] == "ready"


def test_import_nibs_does_not_import_a_plugin(guests):
    guests.add("nibs-loud", "print('loud was imported')\n", entry="loud", module="nibs_loud")

    answer = guests.run("import nibs")

    assert answer.out == ""


def test_a_guest_that_imports_a_framework_leaves_import_nibs_light(guests, well_behaved):
    (guests.folder / "heavy_framework.py").write_text("import time\ntime.sleep(0)\n", encoding="utf-8")
    guests.add("nibs-rude", "import heavy_framework\n" + well_behaved("rude"), entry="rude", module="nibs_rude")

    answer = guests.run("import sys, nibs\nprint('heavy_framework' in sys.modules)")

    assert answer.out.strip() == "False"


def test_a_guest_that_asks_for_backends_while_it_is_imported_is_heard(guests, well_behaved):
    source = "import nibs\nnibs.backends()\n" + well_behaved("curious")
    guests.add("nibs-curious", source, entry="curious", module="nibs_curious")
    guests.add("nibs-good", well_behaved("good"), entry="good", module="nibs_good")

    found = guests.look()

    assert found["curious"]["state"] == "ready"
    assert found["good"]["state"] == "ready"


def test_two_plugins_of_one_name_name_both_distributions(guests, well_behaved):
    guests.add("nibs-first", well_behaved("twin"), entry="twin", module="nibs_first")
    guests.add("nibs-second", well_behaved("twin"), entry="twin", module="nibs_second")

    found = guests.look()["twin"]

    assert found["state"] == "broken"
    assert "nibs-first 1.0" in found["reason"]
    assert "nibs-second 1.0" in found["reason"]


def test_using_a_name_that_two_plugins_bring_is_an_error_that_names_both(guests, well_behaved):
    guests.add("nibs-first", well_behaved("twin"), entry="twin", module="nibs_first")
    guests.add("nibs-second", well_behaved("twin"), entry="twin", module="nibs_second")

    answer = guests.run("""
        from nibs.errors import BackendUnavailable
        from nibs.registry import registry
        try:
            registry.load("twin")
        except BackendUnavailable as error:
            print(error)
    """)

    assert "nibs-first 1.0" in answer.out
    assert "nibs-second 1.0" in answer.out


def test_two_entry_points_of_one_name_may_bring_two_backends(guests, well_behaved):
    guests.add("nibs-first", well_behaved("one"), entry="plugin", module="nibs_first")
    guests.add("nibs-second", well_behaved("two"), entry="plugin", module="nibs_second")

    found = guests.look()

    assert (found["one"]["state"], found["two"]["state"]) == ("ready", "ready")


def test_an_entry_point_may_name_an_object(guests, well_behaved):
    source = """
    from nibs.capabilities import BackendInfo, Capabilities
    from nibs.hookspecs import hookimpl

    class Plugin:
        @hookimpl
        def nibs_backends(self):
            yield BackendInfo(name="object", arrays=(), capabilities=Capabilities(), load=lambda: None)

    plugin = Plugin()
    """
    guests.add("nibs-object", source, entry="object", module="nibs_object")
    info = guests.folder / "nibs_object-1.0.dist-info" / "entry_points.txt"
    info.write_text("[nibs]\nobject = nibs_object:plugin\n", encoding="utf-8")

    assert guests.look()["object"]["state"] == "ready"


def test_a_half_removed_distribution_is_no_crash(guests, well_behaved):
    guests.add("nibs-ghost", well_behaved("ghost"), entry="ghost", module="nibs_ghost", metadata=False)
    (guests.folder / "nibs_ghost.py").unlink()
    guests.add("nibs-good", well_behaved("good"), entry="good", module="nibs_good")

    found = guests.look()

    assert found["ghost"]["state"] == "broken"
    assert found["good"]["state"] == "ready"


def test_a_plugin_is_named_by_the_environment_without_being_installed(guests, well_behaved):
    (guests.folder / "nibs_loose.py").write_text(well_behaved("loose"), encoding="utf-8")

    found = guests.look(NIBS_PLUGINS="nibs_loose")["loose"]

    assert (found["state"], found["distribution"]) == ("ready", "NIBS_PLUGINS")


def test_a_plugin_that_is_installed_and_named_by_the_environment_counts_once(guests, well_behaved):
    guests.add("nibs-good", well_behaved("good"), entry="good", module="nibs_good")

    found = guests.look(NIBS_PLUGINS="nibs_good, nibs_good")["good"]

    assert found["state"] == "ready"


def test_a_broken_plugin_that_is_installed_and_named_by_the_environment_keeps_its_reason(guests):
    guests.add("nibs-bad", "import a_module_that_nobody_has\n", entry="bad", module="nibs_bad")

    found = guests.look(NIBS_PLUGINS="nibs_bad")["bad"]

    assert "a_module_that_nobody_has" in found["reason"]


def test_a_loader_that_raises_is_unavailable_with_the_cause_and_the_command(guests, well_behaved):
    source = well_behaved("broken", "pip install nibs-broken").replace("lambda: None", "lambda: 1 / 0")
    guests.add("nibs-broken", source, entry="broken", module="nibs_broken")

    answer = guests.run("""
        from nibs.errors import BackendUnavailable
        from nibs.registry import registry
        try:
            registry.load("broken")
        except BackendUnavailable as error:
            print(error)
            print(repr(error.__cause__))
    """)

    assert "division by zero" in answer.out
    assert "pip install nibs-broken" in answer.out
    assert "ZeroDivisionError" in answer.out.splitlines()[-1]


def test_a_loader_that_exits_is_unavailable(guests, well_behaved):
    source = well_behaved("leaver").replace("lambda: None", "lambda: exit('bye')")
    guests.add("nibs-leaver", source, entry="leaver", module="nibs_leaver")

    answer = guests.run("""
        from nibs.errors import BackendUnavailable
        from nibs.registry import registry
        try:
            registry.load("leaver")
        except BackendUnavailable as error:
            print(error)
    """)

    assert "leaver" in answer.out
    assert answer.code == 0


def test_a_loader_that_gives_no_backend_is_unavailable(guests, well_behaved):
    guests.add("nibs-empty", well_behaved("empty"), entry="empty", module="nibs_empty")

    answer = guests.run("""
        from nibs.errors import BackendUnavailable
        from nibs.registry import registry
        try:
            registry.load("empty")
        except BackendUnavailable as error:
            print(error)
    """)

    assert "'empty'" in answer.out
    assert "loss" in answer.out


def test_an_unknown_name_lists_ready_and_broken_and_the_nearest(guests, well_behaved):
    guests.add("nibs-good", well_behaved("good"), entry="good", module="nibs_good")
    guests.add("nibs-bad", "raise OSError('libnvrtc.so.13 not found')\n", entry="bad", module="nibs_bad")

    answer = guests.run("""
        from nibs.errors import UnknownBackend
        from nibs.registry import registry
        try:
            registry.load("godo")
        except UnknownBackend as error:
            print(error)
    """)

    assert "no backend named 'godo'" in answer.out
    assert "good" in answer.out
    assert "bad (broken: OSError: libnvrtc.so.13 not found)" in answer.out
    assert "Did you mean 'good'?" in answer.out


def test_with_no_backend_at_all_the_error_says_what_to_install(guests):
    answer = guests.run(
        """
        import importlib.metadata
        importlib.metadata.entry_points = lambda **group: []
        import nibs.registry
        from nibs.errors import NibsError
        try:
            nibs.registry.Registry().load("numpy")
        except NibsError as error:
            print(error)
    """,
        NIBS_PLUGINS="",
    )

    assert "pip install nibs-numpy" in answer.out
