#!/usr/bin/env python3
"""In the guest: real QEMUs on the sample device mtty, vfio-migrate relay between them.

usage: qemu-peers.py [SCENARIO ...]        all of them, without arguments

Needs in the guest: /dev/vfio, four mdevs of mtty ($MDEVS, their uuids), qemu-system-x86_64, and in
the working directory the static vfio-migrate and, for the scenarios that have no source, the
directories captures/NAME and recut/NAME with the connections' bytes (00-c2s.bin is the main channel).
Writes one directory for each scenario to $OUT: its log, both QEMUs' traces and stderr.

A QEMU that got a bad packet hangs without a word, its monitor dead: every wait here has its end, and
every process is killed at the end of its scenario, however that comes.

The QEMUs run TCG within a guest that itself runs TCG, with 64 MiB of RAM and only a firmware. On
Debian's kernels a device must have x-device-dirty-page-tracking=off: they cannot report dirty pages
without IOMMUFD. What converges slowly is helped by avail-switchover-bandwidth.
"""
import glob
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

OUT = os.environ.get("OUT", "/out/qemu")
MDEVS = os.environ["MDEVS"].split()
QEMU = "/usr/bin/qemu-system-x86_64"
RELAY = os.path.join(os.getcwd(), "vfio-migrate")
SOURCE_SENDS_TO, DESTINATION_LISTENS_AT = 4444, 5555
LIMIT = 60  # seconds for one migration
ANSWER = 20  # seconds for one answer of a monitor

# relay: options of vfio-migrate relay, or None: without one
# replay: the directory of recorded connections, in the place of a source
# loads: how many data packets the destination loads into all devices together
# ends: how the destination may end
# refuses: what the relay, which then ends with status 1, says
SCENARIOS = {
    "direct-1dev-2ch": dict(devices=1, channels=2, relay=None, loads=1),
    "relay-1dev-2ch": dict(devices=1, channels=2, relay="", loads=1),
    "relay-2dev-3ch": dict(devices=2, channels=3, relay="", loads=2),
    "relay-1dev-paused": dict(devices=1, channels=2, relay="", loads=1, paused=True),
    "relay-1dev-small-budget": dict(devices=1, channels=4, relay="--budget 2112KiB", loads=1),
    "recorded": dict(devices=1, channels=2, relay=None, loads=1, replay="captures/01-xfer-on-1dev-2ch"),
    "recut": dict(devices=1, channels=2, relay=None, loads=8, replay="recut/01-xfer-on-1dev-2ch"),
    "recut-relay": dict(devices=1, channels=2, relay="", loads=8, replay="recut/01-xfer-on-1dev-2ch"),
    "recut-2dev": dict(devices=2, channels=3, relay=None, loads=16, replay="recut/05-xfer-on-2dev-3ch"),
    "recut-2dev-relay": dict(devices=2, channels=3, relay="", loads=16, replay="recut/05-xfer-on-2dev-3ch"),
    # What QEMU does with a bad packet is its own affair: it is written down, and bounded.
    "bad-version": dict(devices=1, channels=2, relay=None, replay="recut/bad-version", ends=("hangs", "fails")),
    "bad-version-relay": dict(
        devices=1, channels=2, relay="", replay="recut/bad-version", gap=0, ends=("hangs", "fails"),
        refuses="unknown packet version 1",
    ),
}


class Failed(Exception):
    pass


def renew(mdevs):
    """Makes the devices anew: one that a QEMU left in RESUMING would give the next one no data fd."""
    for mdev in mdevs:
        with open("/sys/bus/mdev/devices/%s/remove" % mdev, "w") as file:
            file.write("1")
    kind = os.environ.get("MDEV_TYPE", "mtty-2")
    for mdev in mdevs:
        with open("/sys/class/mdev_bus/mtty/mdev_supported_types/%s/create" % kind, "w") as file:
            file.write(mdev)


class Log:
    def __init__(self, directory):
        self.file = open(directory + "/log", "w")
        self.start = time.time()
        self.lock = threading.Lock()

    def __call__(self, *words):
        line = "%8.3f  %s" % (time.time() - self.start, " ".join(str(word) for word in words))
        with self.lock:
            print(line, flush=True)
            self.file.write(line + "\n")
            self.file.flush()


class Monitor:
    """A QEMU's QMP socket. Every answer has its time-out."""

    def __init__(self, path, log, name):
        self.log, self.name = log, name
        end = time.time() + ANSWER
        while True:
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect(path)
                break
            except OSError:
                if time.time() > end:
                    raise Failed(name + " has no monitor")
                time.sleep(0.1)
        self.socket.settimeout(ANSWER)
        self.lines = self.socket.makefile("rw")
        self.version = json.loads(self.lines.readline())["QMP"]["version"]["qemu"]
        self("qmp_capabilities", quiet=True)

    def __call__(self, command, quiet=False, **arguments):
        try:
            self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            self.lines.flush()
            while True:
                line = self.lines.readline()
                if not line:
                    raise Failed("%s is gone, at %s" % (self.name, command))
                answer = json.loads(line)
                if answer.get("event") == "MIGRATION":
                    self.log(self.name, "MIGRATION", answer["data"]["status"])
                if "event" in answer:
                    continue
                if "error" in answer:
                    raise Failed("%s: %s: %s" % (self.name, command, answer["error"]["desc"]))
                if not quiet:
                    self.log(self.name, command, json.dumps(answer["return"]))
                return answer["return"]
        except OSError as error:
            raise Failed("%s does not answer %s: %s" % (self.name, command, error))


class Scenario:
    def __init__(self, name, what):
        self.name, self.what = name, what
        self.directory = "/tmp/qemu/" + name
        os.makedirs(self.directory, exist_ok=True)
        self.log = Log(self.directory)
        self.processes = []
        self.sockets = []

    def completes(self):
        return "ends" not in self.what

    def spawn(self, name, command, **files):
        self.log(name, " ".join(command))
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **files)
        self.processes.append((name, process))
        return process

    def qemu(self, side, mdevs, extra):
        command = [QEMU, "-name", side, "-accel", "tcg", "-M", "q35", "-nodefaults", "-display", "none"]
        command += ["-m", "16" if self.what.get("paused") else "64", "-L", "/usr/share/qemu"]
        socket_path = "/tmp/%s.qmp" % side
        if os.path.exists(socket_path):
            os.unlink(socket_path)
        command += ["-qmp", "unix:%s,server=on,wait=off" % socket_path]
        command += ["-D", "%s/%s.trace" % (self.directory, side), "-trace", "vfio_load_*", "-trace", "vfio_save_*"]
        for number, mdev in enumerate(mdevs):
            command += ["-device", "vfio-pci,id=m%d,sysfsdev=/sys/bus/mdev/devices/%s,enable-migration=on," % (number, mdev)
                        + "x-migration-multifd-transfer=on,x-device-dirty-page-tracking=off"]
        with open("%s/%s.stderr" % (self.directory, side), "w") as stderr:
            self.spawn(side, command + extra, stdout=stderr, stderr=stderr)
        monitor = Monitor(socket_path, self.log, side)
        states = {"events": True, "multifd": True, "return-path": True, "switchover-ack": True}
        monitor("migrate-set-capabilities", quiet=True,
                capabilities=[{"capability": name, "state": state} for name, state in states.items()])
        monitor("migrate-set-parameters", quiet=True, **{
            "multifd-channels": self.what["channels"], "max-bandwidth": 10**9,
            "avail-switchover-bandwidth": 10**10, "downtime-limit": 2000})
        return monitor

    def start_relay(self):
        command = [RELAY, "relay", "--json", "--listen", "127.0.0.1:%d" % SOURCE_SENDS_TO,
                   "--to", "127.0.0.1:%d" % DESTINATION_LISTENS_AT, "--timeout", "20"] + self.what["relay"].split()
        with open(self.directory + "/relay.json", "w") as out, open(self.directory + "/relay.stderr", "w") as errors:
            relay = self.spawn("relay", command, stdout=out, stderr=errors)
        end = time.time() + ANSWER
        while "listening on" not in open(self.directory + "/relay.stderr").read():
            if time.time() > end or relay.poll() is not None:
                raise Failed("the relay does not listen")
            time.sleep(0.05)
        return relay

    def replay(self, port):
        """Sends recorded connections, each from a thread of its own."""
        def send(connection, path):
            data = open(path, "rb").read()
            try:
                connection.sendall(data)
                if not os.path.basename(path).startswith("00"):
                    connection.shutdown(socket.SHUT_WR)
                self.log("replayed", path, len(data), "bytes")
                while True:
                    said = connection.recv(4096)
                    if not said:
                        break
                    self.log("the destination says", said.hex(" "))
            except OSError as error:
                self.log("replay of", path, "ended:", error)
        for path in sorted(glob.glob(self.what["replay"] + "/*-c2s.bin")):
            try:
                connection = socket.create_connection(("127.0.0.1", port), timeout=LIMIT)
            except OSError as error:
                raise Failed("cannot connect to replay %s: %s" % (path, error))
            self.sockets.append(connection)
            threading.Thread(target=send, args=(connection, path), daemon=True).start()
            time.sleep(self.what.get("gap", 0.2))

    def watch(self, monitors):
        """Until no migration is under way any more. What each says of it then."""
        limit = LIMIT if self.completes() else 15
        end = time.time() + limit
        while True:
            states = {name: monitor("query-migrate", quiet=True).get("status", "none") for name, monitor in monitors.items()}
            if all(state in ("completed", "failed", "cancelled") for state in states.values()):
                return states
            if time.time() > end:
                raise Failed("not at an end after %d s: %s" % (limit, states))
            time.sleep(0.2)

    def migrate(self):
        count = self.what["devices"]
        renew(MDEVS)
        paused = ["-S"] if self.what.get("paused") else []
        monitors = {"destination": self.qemu("destination", MDEVS[count:2 * count], paused + ["-incoming", "defer"])}
        destination = monitors["destination"]
        self.log("QEMU", json.dumps(destination.version))
        destination("migrate-incoming", quiet=True, uri="tcp:127.0.0.1:%d" % DESTINATION_LISTENS_AT)
        relay = None if self.what["relay"] is None else self.start_relay()
        port = DESTINATION_LISTENS_AT if relay is None else SOURCE_SENDS_TO
        if "replay" in self.what:
            self.replay(port)
        else:
            monitors["source"] = self.qemu("source", MDEVS[:count], paused)
            time.sleep(2)  # its firmware is at work
            monitors["source"]("migrate", quiet=True, uri="tcp:127.0.0.1:%d" % port)
        states = self.watch(monitors)
        for name in monitors:
            monitors[name]("query-migrate")
        for connection in self.sockets:
            connection.close()
        if set(states.values()) != {"completed"}:
            raise Failed("not completed: %s" % states)
        status = destination("query-status")
        if status["status"] != ("paused" if paused else "running") and not (paused and status["status"] == "prelaunch"):
            raise Failed("the destination is %s" % status)
        if relay is not None:
            self.end_relay(relay, 0)
            moved = json.load(open(self.directory + "/relay.json"))
            self.log("relay:", json.dumps(moved))
            if len(moved["devices"]) != count or any(device["packets"] < 2 for device in moved["devices"]):
                raise Failed("not all device state went through the relay")
        for name in monitors:
            monitors[name]("quit", quiet=True)
        try:
            dict(self.processes)["destination"].wait(ANSWER)
        except subprocess.TimeoutExpired:
            raise Failed("the destination does not quit")
        trace = open(self.directory + "/destination.trace").read()
        loads = trace.count("vfio_load_state_device_buffer_load_end")
        self.log("the destination loaded", loads, "data packets")
        if loads != self.what["loads"]:
            raise Failed("not the %d that there are" % self.what["loads"])

    def end_relay(self, relay, status):
        try:
            relay.wait(ANSWER)
        except subprocess.TimeoutExpired:
            raise Failed("the relay does not end")
        self.log("relay: exit status", relay.returncode, open(self.directory + "/relay.stderr").read().strip())
        if relay.returncode != status:
            raise Failed("the relay ended with %d" % relay.returncode)

    def run(self):
        try:
            try:
                self.migrate()
                result = "completes"
            except Failed as failure:
                self.log("failed:", failure)
                destination = dict(self.processes).get("destination")
                gone = destination is None or destination.poll() is not None
                result = "fails" if gone else "hangs"
                if "refuses" in self.what:
                    self.end_relay(dict(self.processes)["relay"], 1)
                    if self.what["refuses"] not in open(self.directory + "/relay.stderr").read():
                        raise Failed("the relay does not say: " + self.what["refuses"])
        except Failed as failure:
            self.log("failed:", failure)
            result = "fails otherwise"
        finally:
            self.end()
        good = result in self.what.get("ends", ("completes",))
        self.log("RESULT", self.name, result, "as it may" if good else "WHERE IT MUST NOT")
        shutil.copytree(self.directory, OUT + "/" + self.name, dirs_exist_ok=True)
        return good

    def end(self):
        for connection in self.sockets:
            connection.close()
        for name, process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                self.log(name, "does not end: killed")
                process.send_signal(signal.SIGKILL)
                process.wait()
            self.log(name, "exit status", process.returncode)


def main():
    names = sys.argv[1:] or list(SCENARIOS)
    results = {name: Scenario(name, SCENARIOS[name]).run() for name in names}
    for name, good in results.items():
        print("%-28s %s" % (name, "ok" if good else "FAILED"), flush=True)
    sys.exit(0 if all(results.values()) else 1)


if __name__ == "__main__":
    main()
