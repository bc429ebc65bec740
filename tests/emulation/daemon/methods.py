"""The methods of the Admin API that are about qubes: their lives, notes, properties, tags and features."""

import unicodedata

from tests.emulation.daemon import features, properties
from tests.emulation.daemon.calls import Answer, Call, lines, method
from tests.emulation.daemon.errors import protocol
from tests.emulation.daemon.state import KLASSES

_NOTES_LIMIT = 256_000


# --- Qubes ---------------------------------------------------------------------------------------


@method("admin.vmclass.List", dom0=True)
def _classes(_call: Call) -> Answer:
    return lines((*KLASSES, "AdminVM"))


@method("admin.vm.List")
def _list(call: Call) -> Answer:
    listed = call.system.domains.values() if call.dest.klass == "AdminVM" else [call.dest]
    return lines(
        [
            f"{vm.name} class={vm.klass} state={vm.power_state} uuid={vm.properties['uuid']}"
            for vm in sorted(listed, key=lambda vm: (vm.klass != "AdminVM", vm.name))
        ]
    )


for _klass in KLASSES:

    @method(f"admin.vm.Create.{_klass}", f"admin.vm.CreateInPool.{_klass}", arg=None, payload=None, dom0=True)
    def _create(call: Call) -> Answer:
        _, _, kind, klass = call.method.split(".")
        call.parts.lifecycle.create(klass, call.arg, call.payload, kind == "CreateInPool")
        return None


@method("admin.vm.Remove", locked=False)
def _remove(call: Call) -> Answer:
    call.parts.lifecycle.remove(call.dest.name)
    return None


@method("admin.vm.Start", locked=False)
def _start(call: Call) -> Answer:
    call.parts.lifecycle.start(call.dest.name)
    return None


@method("admin.vm.Kill", locked=False)
def _kill(call: Call) -> Answer:
    call.parts.lifecycle.kill(call.dest.name)
    return None


@method("admin.vm.Shutdown", arg=None, locked=False)
def _shutdown(call: Call) -> Answer:
    options = call.arg.split("+") if call.arg else []
    if not set(options) <= {"force", "wait"}:
        raise protocol("Argument must match: force, wait")
    call.parts.lifecycle.shutdown(call.dest.name, "force" in options)
    return None


@method("admin.vm.CurrentState")
def _state(call: Call) -> Answer:
    # Of dom0 it is what the computer has, in MiB (qubes/vm/adminvm.py).
    most = call.parts.system.memory if call.dest.klass == "AdminVM" else 0
    return f"mem=0 mem_static_max={most} cputime=0 power_state={call.dest.power_state}"


@method("admin.vm.notes.Get", dom0=False)
def _notes(call: Call) -> Answer:
    return call.dest.notes


@method("admin.vm.notes.Set", arg=None, payload=None, dom0=False)
def _set_notes(call: Call) -> Answer:
    if len(call.payload) > _NOTES_LIMIT:
        raise protocol(f"Maximum note size is {_NOTES_LIMIT} bytes ({len(call.payload)} bytes received)")
    try:
        text = call.payload.decode()
    except UnicodeDecodeError as error:
        raise protocol(f"Unable to sanitise qube notes: {error}") from None
    call.dest.notes = "".join(
        character if character in "\t\n" or unicodedata.category(character)[0] not in "CZ" or character == " "
        else "_"
        for character in text
    )  # fmt: skip
    return None


# --- Properties ----------------------------------------------------------------------------------


@method("admin.property.List", dom0=True)
@method("admin.vm.property.List")
def _property_list(call: Call) -> Answer:
    return lines(list(call.system.table[call.holder.klass]))


@method("admin.property.Get", arg=True, dom0=True)
@method("admin.vm.property.Get", arg=True)
def _property_get(call: Call) -> Answer:
    return _property(call, call.arg)


@method("admin.property.GetAll", dom0=True)
@method("admin.vm.property.GetAll")
def _property_get_all(call: Call) -> Answer:
    names = sorted(call.system.table[call.holder.klass])
    texts = [f"{name} {_property(call, name)}" for name in names]
    return lines([text.replace("\\", "\\\\").replace("\n", "\\n") for text in texts])


@method("admin.property.GetDefault", arg=True, dom0=True)
@method("admin.vm.property.GetDefault", arg=True)
def _property_get_default(call: Call) -> Answer:
    row = properties.find(call.system, call.holder, call.arg)
    try:
        value = properties.default(call.system, call.holder, row)
    except properties.NoValueError:
        return None
    return f"type={row.api_type} {'' if value is None else value}"


@method("admin.property.Set", arg=True, payload=None, dom0=True)
@method("admin.vm.property.Set", arg=True, payload=None)
def _property_set(call: Call) -> Answer:
    properties.write(call.system, call.holder, call.arg, call.payload)
    if call.arg == "template":
        call.parts.volumes.follow_template(call.dest)
    _follow(call)
    return None


@method("admin.property.Reset", arg=True, dom0=True)
@method("admin.vm.property.Reset", arg=True)
def _property_reset(call: Call) -> Answer:
    properties.reset(call.system, call.holder, call.arg)
    _follow(call)
    return None


def _follow(call: Call) -> None:
    """What changes with a property: the tags that name the GUI and audio domains."""
    for key in ("guivm", "audiovm"):
        if call.arg == key:
            features.follow_reference(call.system, call.dest, key)
        elif call.arg == f"default_{key}":
            for vm in call.system.domains.values():
                if key not in vm.properties:
                    features.follow_reference(call.system, vm, key)


def _property(call: Call, name: str) -> str:
    row = properties.find(call.system, call.holder, name)
    try:
        value = properties.read(call.system, call.holder, name)
    except properties.NoValueError:
        return f"default=True type={row.api_type} "
    is_default = name not in call.holder.properties
    return f"default={is_default} type={row.api_type} {'' if value is None else value}"


# --- Tags and features ---------------------------------------------------------------------------


@method("admin.vm.tag.List")
def _tag_list(call: Call) -> Answer:
    return lines(sorted(call.dest.tags))


@method("admin.vm.tag.Get", arg=None)
def _tag_get(call: Call) -> Answer:
    features.check_tag(call.arg)
    return "1" if call.arg in call.dest.tags else "0"


@method("admin.vm.tag.Set", arg=None)
def _tag_set(call: Call) -> Answer:
    features.check_tag(call.arg)
    features.add_tag(call.system, call.dest, call.arg)
    return None


@method("admin.vm.tag.Remove", arg=None)
def _tag_remove(call: Call) -> Answer:
    features.check_tag(call.arg)
    features.remove_tag(call.dest, call.arg)
    return None


@method("admin.vm.feature.List")
def _feature_list(call: Call) -> Answer:
    return lines(list(call.dest.features))


@method("admin.vm.feature.Get", arg=None)
def _feature_get(call: Call) -> Answer:
    if call.arg not in call.dest.features:
        raise features.missing_feature(call.dest, call.arg)
    return call.dest.features[call.arg]


@method("admin.vm.feature.CheckWithTemplate", arg=None)
def _feature_check(call: Call) -> Answer:
    for vm in call.system.chain(call.dest):
        if call.arg in vm.features:
            return vm.features[call.arg]
    raise features.missing_feature(call.dest, call.arg)


@method("admin.vm.feature.Set", arg=None, payload=None)
def _feature_set(call: Call) -> Answer:
    features.set_feature(call.dest, call.arg, call.payload)
    return None


@method("admin.vm.feature.Remove", arg=None)
def _feature_remove(call: Call) -> Answer:
    features.remove_feature(call.dest, call.arg)
    return None
