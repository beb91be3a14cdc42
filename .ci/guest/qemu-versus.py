#!/usr/bin/env python3
"""In the guest: QEMU to QEMU beside vfio-migrate send to receive, on the same devices, in turn.

usage: qemu-versus.py ROUNDS

For one device and for two, round by round: a migration between two QEMUs, then one between `send` and `receive`,
over loopback with as many channels and the same mdevs, whose driver has a large state (guest.pad of the kernel's
command line). From both programs' trace events, whose times are one clock's:

    STOP_COPY reached (the last device's) ──────────▶ the last buffer loaded into a device

What is left out, and why: what comes before and after. Before, the driver copies its whole state at STOP_COPY;
after, it copies it again from RESUMING to STOP. Both programs make these calls, and under TCG each takes 0.2 to
4 s by chance. RAM is left out too: the QEMUs have 64 MiB, and are paused.

Memory is the destination's peak (VmHWM) of the whole process; "grown" is what a QEMU had beyond what it had before
its migration began, beside the whole of ours. CPU time is both destination's, from before the migration to its
end, the driver's copies included.

Writes the rounds to $OUT/versus.json, which `ratios --beside` prints beside the goals.
"""
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time

spec = importlib.util.spec_from_file_location("peers", "qemu-peers.py")
peers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(peers)

CHANNELS = 4
LIMIT = 120  # seconds for one migration
PORT = 6666
TICK = os.sysconf("SC_CLK_TCK")


def proc(pid):
    """CPU seconds and the peak in KiB of a process that lives."""
    stat = open("/proc/%d/stat" % pid).read()
    fields = stat[stat.rindex(")") + 2:].split()
    status = open("/proc/%d/status" % pid).read()
    peak = int(re.search(r"VmHWM:\s+(\d+)", status).group(1))
    return (int(fields[11]) + int(fields[12])) / TICK, peak


def moments(path, pattern):
    """When each line with `pattern` was written, in QEMU's form or in ours."""
    found = []
    for line in open(path, errors="replace"):
        if not re.search(pattern, line):
            continue
        qemus = re.match(r"\d+@(\d+\.\d+):", line)
        ours = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d+)Z", line)
        if qemus:
            found.append(float(qemus[1]))
        elif ours:
            second = datetime.datetime.fromisoformat(ours[1] + "+00:00").timestamp()
            found.append(second + float("0." + ours[2]))
    if not found:
        raise peers.Failed("no %s in %s" % (pattern, path))
    return found


def interval(source, stopped, destination, loaded):
    return {"time": max(moments(destination, loaded)) - max(moments(source, stopped))}


def between_qemus(count):
    """One migration between two QEMUs."""
    what = dict(devices=count, channels=CHANNELS, relay=None, paused=False)
    scenario = peers.Scenario("versus-%d" % count, what)
    spawn = scenario.spawn

    def traced(name, command, **files):
        return spawn(name, command + ["-msg", "timestamp=on", "-trace", "vfio_migration_set*"], **files)
    scenario.spawn = traced
    try:
        peers.renew(peers.MDEVS)
        destination = scenario.qemu("destination", peers.MDEVS[count:2 * count], ["-S", "-incoming", "defer"])
        uri = "tcp:127.0.0.1:%d" % PORT
        destination("migrate-incoming", quiet=True, uri=uri)
        source = scenario.qemu("source", peers.MDEVS[:count], ["-S"])
        time.sleep(1)
        pid = dict(scenario.processes)["destination"].pid
        before = proc(pid)
        source("migrate", quiet=True, uri=uri)
        end = time.time() + LIMIT
        while True:
            states = [monitor("query-migrate", quiet=True).get("status") for monitor in (source, destination)]
            if states == ["completed"] * 2:
                break
            if "failed" in states or time.time() > end:
                raise peers.Failed("the QEMUs are %s" % states)
            time.sleep(0.2)
        after = proc(pid)
        for monitor in (source, destination):
            monitor("quit", quiet=True)
    finally:
        scenario.end()
    taken = interval(scenario.directory + "/source.trace", "vfio_migration_set_device_state.*STOP_COPY",
                     scenario.directory + "/destination.trace", "vfio_load_state_device_buffer_load_end")
    return dict(taken, cpu=after[0] - before[0], peak=after[1], grown=after[1] - before[1])


def between_ours(count):
    """One migration between send and receive."""
    peers.renew(peers.MDEVS)
    directory = "/tmp/versus"
    os.makedirs(directory, exist_ok=True)
    environment = dict(os.environ, VFIO_MIGRATE_LOG="vfio_migration=debug")

    def start(verb, where, mdevs):
        command = ["./vfio-migrate", verb, "--json", where, "127.0.0.1:%d" % PORT, "--channels", str(CHANNELS)]
        for number, mdev in enumerate(mdevs):
            command += ["--device", "vfio:/sys/bus/mdev/devices/%s,id=m%d" % (mdev, number)]
        with open("%s/%s.json" % (directory, verb), "w") as out, open("%s/%s.log" % (directory, verb), "w") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=environment)
    destination = start("receive", "--listen", peers.MDEVS[count:2 * count])
    time.sleep(0.5)
    source = start("send", "--to", peers.MDEVS[:count])
    usage, status = None, None
    end = time.time() + LIMIT
    while status is None:
        pid, status, usage = os.wait4(destination.pid, os.WNOHANG)
        if pid == 0:
            status = None
            if time.time() > end:
                destination.kill()
                source.kill()
                raise peers.Failed("receive has not ended")
            time.sleep(0.02)
    if source.wait(LIMIT) != 0 or status != 0:
        raise peers.Failed("send ended with %s, receive with %s: %s" % (
            source.returncode, status, open(directory + "/receive.log").read()[-500:]))
    taken = interval(directory + "/send.log", "migration_set_device_state.*STOP_COPY",
                     directory + "/receive.log", "load_state_device_buffer_end")
    return dict(taken, cpu=usage.ru_utime + usage.ru_stime, peak=usage.ru_maxrss)


def main():
    rounds = int(sys.argv[1])
    rows = {}

    def add(name, value):
        rows.setdefault(name, []).append(value)
    for number in range(rounds + 1):  # the first is not counted
        for count in (1, 2):
            qemu, ours = between_qemus(count), between_ours(count)
            print("VERSUS %d %d %s" % (number, count, json.dumps({"qemu": qemu, "ours": ours})), flush=True)
            if number == 0:
                continue
            add("versus-qemu-%d" % count, qemu["time"] / ours["time"])
            if count == 2:
                add("versus-qemu-memory", qemu["peak"] / ours["peak"])
                add("versus-qemu-memory-grown", qemu["grown"] / ours["peak"])
                add("versus-qemu-cpu", qemu["cpu"] / ours["cpu"])
    os.makedirs(peers.OUT, exist_ok=True)
    with open(peers.OUT + "/versus.json", "w") as file:
        json.dump(rows, file)
    print("VERSUS done", flush=True)


if __name__ == "__main__":
    try:
        main()
    except peers.Failed as failure:
        print("VERSUS failed: %s" % failure, flush=True)
        shutil.copytree("/tmp/qemu", peers.OUT, dirs_exist_ok=True)
        sys.exit(1)
