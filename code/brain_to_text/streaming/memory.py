"""How much memory this process may still use, cgroup limits of its container included."""

from __future__ import annotations

from pathlib import Path

_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2**63 for "no limit"


def available_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can still be allocated before the machine or the container runs out.

    The least of what the kernel calls available and, for each cgroup (v1 or v2) from this process's
    own up to the root, its limit less its use; file pages the kernel can drop count as free.

    Args:
        proc, cgroup: where procfs and the cgroup file system are mounted.

    Returns:
        Bytes; 0 at least. Where nothing can be read (no Linux), 4 GiB.
    """
    rooms = [*_machine(proc), *_groups(proc, cgroup)]
    return max(0, min(rooms)) if rooms else 4 << 30


def _machine(proc: Path) -> list[int]:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return []
    return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]


def _groups(proc: Path, root: Path) -> list[int]:
    """Room left in every cgroup this process is in."""
    try:
        entries = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        entries = []
    rooms: list[int] = []
    for entry in [*entries, "0::/"]:
        _, controllers, path = entry.split(":", 2)
        if controllers == "":
            names, base = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            base = root / "memory"
        else:
            continue
        # Inside a container the path may be the host's, which does not exist here: then only the
        # mount's own root, which is the container's group, says anything.
        folder = base / path.lstrip("/")
        for group in [folder, *folder.parents]:
            room = _room(group, *names)
            if room is not None:
                rooms.append(room)
            if group == base:
                break
    return rooms


def _room(group: Path, limit_name: str, usage_name: str, droppable: str) -> int | None:
    try:
        limit_text = (group / limit_name).read_text().strip()
        if limit_text == "max" or int(limit_text) >= _UNLIMITED:
            return None
        used = int((group / usage_name).read_text())
        stat = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return int(limit_text) - used + int(stat.get(droppable, 0))
