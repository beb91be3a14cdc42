/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * vfio-migration: moves the migration state of a VM's VFIO devices from one host to another.
 *
 * ONE MIGRATION
 *
 *   source                                             destination
 *   ------                                             -----------
 *   vfm_outgoing_new, add_channel, greet               vfm_incoming_new, add_device, add_channel, setup
 *   vfm_outgoing_section START  -- main channel -->    vfm_main_reader_next, vfm_main_reader_load
 *   rounds of section PART, pending                      ...
 *   the processors stop; stop_vm; begin
 *   command SWITCHOVER_START                           vfm_incoming_switchover_start
 *   section END, section FULL     == channels ==>      ...
 *   finish; vfm_main_writer_eof                        finish; start_vm; the processors start
 *   cleanup   <-- vfm_reply_write SHUT 0, the verdict  join
 *
 * A VMM whose main channel is its own writes and reads the sections' bodies alone: vfm_outgoing_setup_device,
 * iterate, write_state, write_config; vfm_incoming_load_state. One that has a life cycle of its own needs only the
 * sessions: vfm_save, vfm_load. The example loopback.c is both sides in one process. What a migration is, what
 * blocks, what fails and what is left then is in docs/embedding.md; the names there are Rust's, and the steps these.
 *
 * HANDLES: WHO OWNS WHAT
 *
 *   A handle is made by ..._new (or _open, _start, _publisher, _canceller, _stats) through its out parameter, which is
 *   written on success alone, and freed by the caller with ..._free, which takes NULL. A function that is given a
 *   handle does not keep it, with these exceptions:
 *
 *   handle             given to                              and then
 *   struct vfm_device  add_device, outgoing's START          borrowed: back when the session or migration gives it
 *                                                            back; may be freed meanwhile
 *   struct vfm_channel add_channel                           its connection has moved; free the handle
 *   struct vfm_task    the callback of spawn_with            the callback's: vfm_task_run frees it
 *
 *   opaque             every function that takes one         the library's until `release`, which it calls once, also
 *                                                            where the function fails (but not for NULL ops)
 *   a socket           vfm_channel_from_fd                   the library's
 *   a device fd        vfm_device_from_vfio                  still the caller's: the library has a duplicate
 *   a data fd          from `open`, `set_state`              the library's
 *   text, bytes        any function                          the caller's; copied where they are kept
 *   text, bytes        from a function                       the handle's; it says until when
 *
 * THREADS
 *
 *   A handle may be used from any thread, and handed from one to another, except a publisher, which belongs to the
 *   thread that made it. Where two calls cannot run at once in a handle, the second is refused with VFM_CODE_MISUSE,
 *   or waits where its text says so. Nothing else in the process is touched: no signal, no global state. A handle must
 *   not be freed while another thread is in a call with it.
 *
 *   The library makes threads: one for each device, one for each channel, one that moves the bytes; or hands their
 *   work to the caller's threads (vfm_settings_spawn_with). Each callback says which of them calls it. A callback may
 *   call this library, but must not wait for, end or free what is calling it.
 *
 * CALLBACKS
 *
 *   They return 0, or a count, or a negative errno. They must return: no C++ exception, no longjmp, no pthread_exit
 *   leaves them. A pointer that they are given is good until they return.
 *
 * ERRORS
 *
 *   A function that can fail returns an enum vfm_code, and writes an error to `error`, its last parameter, which may
 *   be NULL. On success it writes NULL there. Free it with vfm_error_free; its text says what, where and why. NULL where
 *   none is allowed, a number that is none, a call out of turn: VFM_CODE_MISUSE, and nothing was done. A panic in the
 *   library does not leave it: VFM_CODE_INTERNAL. What cannot be checked is the caller's promise: a pointer is NULL or
 *   good, a handle is not used after its _free, `bytes` and `len` belong together. Of what takes no `error`, the answer
 *   for NULL is the one that says least: 0, -1, false, NULL.
 *
 * VERSIONS
 *
 *   The shared library has symbol versions. While the version is 0.x, a change of its second number may change what is
 *   here; then the library's soname changes too. A structure with `size` may grow at its end.
 */

#ifndef VFIO_MIGRATION_H
#define VFIO_MIGRATION_H

/* Made from capi/src by `BLESS=1 cargo test -p vfio-migration-capi --test header`. */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// The device tracks the memory that it writes to.
#define VFM_PLATFORM_DEVICE_DIRTY_TRACKING 1

// The IOMMU does.
#define VFM_PLATFORM_IOMMU_DIRTY_TRACKING 2

// The device's addresses are a vIOMMU's.
#define VFM_PLATFORM_VIOMMU 4

// The device saves in STOP_COPY and loads in RESUMING: the least that migration needs.
#define VFM_FLAG_STOP_COPY 1

// The device has the P2P states.
#define VFM_FLAG_P2P 2

// The device has the PRE_COPY states.
#define VFM_FLAG_PRE_COPY 4

// The source may be answered on the return path.
#define VFM_COMMAND_OPEN_RETURN_PATH 1

// Asks for VFM_REPLY_PONG with the same value.
#define VFM_COMMAND_PING 2

// The loads may begin.
#define VFM_COMMAND_SWITCHOVER_START 11

// The destination sends no more; its value is the verdict: 0, all is loaded.
#define VFM_REPLY_SHUT 1

// The answer to VFM_COMMAND_PING, with its value.
#define VFM_REPLY_PONG 2

// The initial data is loaded.
#define VFM_REPLY_SWITCHOVER_ACK 7

// What a call came to: a value for each thing that a caller would do differently.
enum vfm_code {
    // It succeeded.
    VFM_CODE_OK = 0,
    // The call or a setting is wrong: NULL, a number that is none, an order that cannot be, a second thread in
    // one handle. Nothing was done; but a migration that is under way may have failed: see its functions.
    VFM_CODE_MISUSE = 1,
    // The peer broke the protocol.
    VFM_CODE_PROTOCOL = 2,
    // The input has ended, and a packet or a config is missing.
    VFM_CODE_MISSING = 3,
    // A connection failed, or its callback did.
    VFM_CODE_CHANNEL = 4,
    // The device refused a transfer or its config: `vfm_error_errno` says why.
    VFM_CODE_DEVICE = 5,
    // The device refused a change of its state, and was recovered: `vfm_error_states`, `vfm_error_errno`.
    VFM_CODE_STATE = 6,
    // The device could not even be reset: it is lost.
    VFM_CODE_LOST = 7,
    // A callback panicked. A callback in C cannot.
    VFM_CODE_PANICKED = 8,
    // Nothing has moved for the time that the settings allow.
    VFM_CODE_STALLED = 9,
    // A driver keeps a transfer beyond the grace time. Its device does not come back and must not be touched.
    VFM_CODE_STUCK = 10,
    // The spill file failed.
    VFM_CODE_SPILL = 11,
    // The host could not give memory, a thread, a file.
    VFM_CODE_HOST = 12,
    // The device, or the VM with it, cannot be migrated: `vfm_error_refusal`.
    VFM_CODE_UNMIGRATABLE = 13,
    // The device has new initial data, and the switchover was already decided.
    VFM_CODE_LATE_REQUEST = 14,
    // Somebody cancelled.
    VFM_CODE_CANCELLED = 15,
    // A mistake of the library's: it caught a panic of its own, say. Please report it.
    VFM_CODE_INTERNAL = 16,
    // An error that this version of the header has no name for.
    VFM_CODE_OTHER = 17,
};

// Why a device, or a VM with it, cannot be migrated.
enum vfm_refusal {
    // There is no refusal.
    VFM_REFUSAL_NONE = 0,
    // The VMM has switched migration off for the device.
    VFM_REFUSAL_SWITCHED_OFF = 1,
    // The kernel has no migration for any such device.
    VFM_REFUSAL_NO_KERNEL_SUPPORT = 2,
    // The device has no migration.
    VFM_REFUSAL_NO_DEVICE_SUPPORT = 3,
    // Nothing tracks the memory that the device writes to.
    VFM_REFUSAL_NO_DIRTY_TRACKING = 4,
    // The device's addresses are a vIOMMU's.
    VFM_REFUSAL_VIOMMU = 5,
    // The VM has several devices, and one has no P2P state.
    VFM_REFUSAL_SEVERAL_WITHOUT_P2P = 6,
    // A reason that this version of the header has no name for.
    VFM_REFUSAL_OTHER = 7,
};

// What ended a section's body.
enum vfm_piece_end {
    // The end tag.
    VFM_PIECE_END_END_OF_STATE = 0,
    // A START's.
    VFM_PIECE_END_SETUP = 1,
    // A START's, where PRE_COPY data comes over the channels.
    VFM_PIECE_END_SETUP_OVER_CHANNELS = 2,
    // A config, and the end tag.
    VFM_PIECE_END_CONFIG = 3,
    // The word that the initial data has been sent.
    VFM_PIECE_END_INIT_DATA_SENT = 4,
    // The word that the config may be loaded.
    VFM_PIECE_END_CONFIG_LOAD_READY = 5,
};

// What a task does.
enum vfm_task_kind {
    // Moves the bytes of all devices.
    VFM_TASK_KIND_IO = 0,
    // Serves one channel.
    VFM_TASK_KIND_CHANNEL = 1,
    // Sets one device's states and calls its callbacks.
    VFM_TASK_KIND_DEVICE = 2,
    // Changes one device's state outside of a session.
    VFM_TASK_KIND_STATE = 3,
    // A kind that this version of the header has no name for.
    VFM_TASK_KIND_OTHER = 4,
};

// A device's states, numbered as in linux/vfio.h.
enum vfm_state {
    // It has failed. It cannot be asked for; as a state to recover to it stands for a reset.
    VFM_STATE_ERROR = 0,
    // It neither runs nor changes its state.
    VFM_STATE_STOP = 1,
    // It runs.
    VFM_STATE_RUNNING = 2,
    // Stopped; its data fd gives the state that is left.
    VFM_STATE_STOP_COPY = 3,
    // Stopped; its data fd takes a state.
    VFM_STATE_RESUMING = 4,
    // It runs, and starts no transfer to another device.
    VFM_STATE_RUNNING_P2P = 5,
    // It runs; its data fd gives what there is already.
    VFM_STATE_PRE_COPY = 6,
    // Both of the above.
    VFM_STATE_PRE_COPY_P2P = 7,
};

// What the VMM must do about a device after a migration.
enum vfm_duty {
    // Nothing: it is in the right state, with the right content.
    VFM_DUTY_NOTHING = 0,
    // It was reset, and its VM is here: the guest's driver sets it up again, or the VMM unplugs it.
    VFM_DUTY_SET_UP_ANEW = 1,
    // It is lost, or runs and must not: its file must be closed before anybody uses it.
    VFM_DUTY_CLOSE = 2,
};

// What can be set for one device, with `vfm_device_set`.
enum vfm_device_setting {
    // Whether it may be migrated, for `vfm_blockers_admit`. VFM_SWITCH_AUTO: yes, unless something speaks against it.
    VFM_DEVICE_SETTING_ENABLE = 0,
    // Whether its state goes over the channels. VFM_SWITCH_AUTO: where they can carry it. Both ends must agree.
    VFM_DEVICE_SETTING_TRANSFER = 1,
    // Whether its own dirty tracking may be used: 0 or 1. Default: 1.
    VFM_DEVICE_SETTING_DIRTY_TRACKING = 2,
    // Whether its `event` is called: 0 or 1. Default: 0.
    VFM_DEVICE_SETTING_EVENTS = 3,
    // Source: the most bytes of one read, and so of a packet. Default, and 0: what it estimates.
    VFM_DEVICE_SETTING_BUFFER_LEN = 4,
    // Whether its config waits for its notice. Default: VFM_SWITCH_INHERIT. Both ends must agree.
    VFM_DEVICE_SETTING_CONFIG_AFTER_ITERABLES = 5,
};

// Why a VM stops.
enum vfm_reason {
    // Its migration is about to end.
    VFM_REASON_FINISH_MIGRATION = 0,
    // Somebody has paused it.
    VFM_REASON_PAUSE = 1,
    // Something else.
    VFM_REASON_OTHER = 2,
};

// Where in its life a part of a section is.
enum vfm_section_kind {
    // The first part: the set-up.
    VFM_SECTION_KIND_START = 1,
    // A further part: an iteration.
    VFM_SECTION_KIND_PART = 2,
    // The last part: the state.
    VFM_SECTION_KIND_END = 3,
    // The only part: the config.
    VFM_SECTION_KIND_FULL = 4,
};

// What the main channel brings.
enum vfm_event_code {
    // The channel has ended, behind its EOF.
    VFM_EVENT_CODE_ENDED = 0,
    // The source's machine: `name`.
    VFM_EVENT_CODE_CONFIGURATION = 1,
    // A section's header. Its body is next (`vfm_main_reader_load`, or `…_read` and `…_footer`).
    VFM_EVENT_CODE_SECTION = 2,
    // A command: `command`, `value` or `payload`.
    VFM_EVENT_CODE_COMMAND = 3,
    // The end of the VM's state: the permission to start. A description may follow.
    VFM_EVENT_CODE_EOF = 4,
    // The sections as JSON, for people: `payload`.
    VFM_EVENT_CODE_DESCRIPTION = 5,
};

// What can be set, with `vfm_settings_set`. Sizes are in bytes, times in milliseconds; UINT64_MAX is a time without
// an end. A switch is 0 or 1; an automatic one is VFM_SWITCH_AUTO, VFM_SWITCH_ON or VFM_SWITCH_OFF. The first part is one side's alone;
// in the second both ends must agree.
enum vfm_setting {
    // How bytes are moved: 0 io_uring where the host allows it, 1 io_uring, 2 plain calls on threads. Default: 0.
    VFM_SETTING_BACKEND = 0,
    // The memory for packets. Default, and 0: 32 MiB, more with many devices.
    VFM_SETTING_BUDGET = 1,
    // Load: the size of a buffer of the budget. Default: 1 MiB.
    VFM_SETTING_BUFFER_LEN = 2,
    // Save: the most data in a packet. Default, and 0: what the device estimates, 64 KiB to 1 MiB.
    VFM_SETTING_DATA_LEN = 3,
    // Load: how far ahead of a device's next packet an idx may be. Default: 65536.
    VFM_SETTING_WINDOW = 4,
    // Load: the largest packet that is accepted. Default: 4 MiB and 12.
    VFM_SETTING_MAX_PACKET = 5,
    // Load: where packets go when the budget is spent: 0 to memory, from channels with RAM; 1 nowhere; 2 to memory,
    // from all. `vfm_settings_spill_to` names a directory. Default: 0.
    VFM_SETTING_SPILL = 6,
    // Load: how much may be spilled. Default: 1 GiB.
    VFM_SETTING_SPILL_LIMIT = 7,
    // Load: the number of channels, where more come than are given before the start. Default: those that are given.
    VFM_SETTING_CHANNELS = 8,
    // The most devices over the session's life. Default, and 0: those that are given before the start.
    VFM_SETTING_MAX_DEVICES = 9,
    // Load: whether a loaded device goes to STOP, in which its driver checks the state. VFM_SWITCH_AUTO: with `vfm_load`
    // alone yes, in a migration no: there `vfm_incoming_start_vm` has it checked.
    VFM_SETTING_STOP_AFTER_LOAD = 10,
    // How long a driver may keep a transfer after a cancellation. Default: 5 s.
    VFM_SETTING_GRACE = 11,
    // How long nothing may move, or a connection stand still within a packet. Default: 60 s.
    VFM_SETTING_NO_PROGRESS = 12,
    // How long a channel may take for its hello. Default: 10 s.
    VFM_SETTING_HELLO_TIMEOUT = 13,
    // Load: how long a channel may take for one packet. Default: 300 s.
    VFM_SETTING_PACKET_TIMEOUT = 14,
    // Load: how long a config may wait for its notice. Default: 600 s.
    VFM_SETTING_CONFIG_READY_TIMEOUT = 15,
    // Load: which thread writes to a device: 0 the one that moves all bytes; 1 a channel's, or a publisher's, while the
    // device is quick. A driver that then does not return keeps that thread. Default: 0.
    VFM_SETTING_WRITER = 16,
    // There are channels besides the main channel. Default: 1.
    VFM_SETTING_MULTIFD = 32,
    // The channels are compressed; then they carry no device state. Default: 0.
    VFM_SETTING_COMPRESSION = 33,
    // The target is a file; then channels carry no device state. Default: 0.
    VFM_SETTING_TO_FILE = 34,
    // The source announces the switchover on the main channel. Default: 1.
    VFM_SETTING_SWITCHOVER_START = 35,
    // The switchover waits until the destination has the initial data: 0 no, 1 for one ack, 2 for one ack of each
    // device, again and again. Default: 0.
    VFM_SETTING_SWITCHOVER_ACK = 36,
    // A config waits for its notice on the main channel. VFM_SWITCH_AUTO: on 64-bit Arm, and not with `vfm_load` alone.
    VFM_SETTING_CONFIG_AFTER_ITERABLES = 37,
    // PRE_COPY data goes over the channels too. No other program than this library has that. Default: 0.
    VFM_SETTING_PRECOPY_OVER_CHANNELS = 38,
    // The VM may run on the destination before its memory is there: refused. Default: 0.
    VFM_SETTING_POSTCOPY = 39,
    // The VM is saved while it runs on: refused. Default: 0.
    VFM_SETTING_BACKGROUND_SNAPSHOT = 40,
};

// A switch that can be left to its rule.
enum vfm_switch {
    // By the rule.
    VFM_SWITCH_AUTO = 0,
    // On.
    VFM_SWITCH_ON = 1,
    // Off.
    VFM_SWITCH_OFF = 2,
    // As the VM's setting of the same name: for a device's settings.
    VFM_SWITCH_INHERIT = 3,
};

// A session's counters, with `vfm_stats_get`. Bytes, or numbers.
enum vfm_counter {
    // The budget, in bytes.
    VFM_COUNTER_BUDGET = 0,
    // How much of it is in use.
    VFM_COUNTER_HELD = 1,
    // The most that was in use.
    VFM_COUNTER_HELD_HIGH = 2,
    // Load: packets that were spilled.
    VFM_COUNTER_SPILLED_PACKETS = 3,
    // Load: their bytes.
    VFM_COUNTER_SPILLED_BYTES = 4,
    // Load: packets for unplugged devices.
    VFM_COUNTER_DROPPED_PACKETS = 5,
    // Load: their bytes.
    VFM_COUNTER_DROPPED_BYTES = 6,
    // Calls into the ring.
    VFM_COUNTER_RING_CALLS = 7,
    // Wake-ups that were lost: must be 0.
    VFM_COUNTER_LATE_WAKEUPS = 8,
    // Transfers that a driver has not given back: each leaks.
    VFM_COUNTER_LEAKED_TRANSFERS = 9,
};

// A device's counters, with `vfm_stats_device`. Bytes, numbers, or times in nanoseconds.
enum vfm_device_counter {
    // Bytes over the channels, packet headers and config included.
    VFM_DEVICE_COUNTER_BYTES = 0,
    // Bytes of data over the main channel.
    VFM_DEVICE_COUNTER_MAIN_BYTES = 1,
    // Packets, config included.
    VFM_DEVICE_COUNTER_PACKETS = 2,
    // Packets that wait now.
    VFM_DEVICE_COUNTER_QUEUED = 3,
    // The most that waited.
    VFM_DEVICE_COUNTER_QUEUED_HIGH = 4,
    // How long the data fd had nothing to do.
    VFM_DEVICE_COUNTER_STARVED_TIME = 5,
    // Transfers on the data fd.
    VFM_DEVICE_COUNTER_TRANSFERS = 6,
    // How long they took together.
    VFM_DEVICE_COUNTER_TRANSFER_TIME = 7,
    // The longest one.
    VFM_DEVICE_COUNTER_TRANSFER_TIME_MAX = 8,
    // Downtime, source: stopping the device.
    VFM_DEVICE_COUNTER_STOP_TIME = 9,
    // Downtime, source: setting STOP_COPY; destination: RESUMING, before the downtime.
    VFM_DEVICE_COUNTER_SET_STATE_TIME = 10,
    // Downtime, source: to the first packet sent.
    VFM_DEVICE_COUNTER_FIRST_OUT_TIME = 11,
    // Downtime, source: to the last byte read.
    VFM_DEVICE_COUNTER_READ_TIME = 12,
    // Downtime, source: from the first packet queued to the last one sent.
    VFM_DEVICE_COUNTER_WIRE_TIME = 13,
    // Downtime, destination: to the first packet.
    VFM_DEVICE_COUNTER_FIRST_IN_TIME = 14,
    // Downtime, destination: waiting for packets.
    VFM_DEVICE_COUNTER_WAIT_TIME = 15,
    // Downtime, destination: writing.
    VFM_DEVICE_COUNTER_WRITE_TIME = 16,
    // Downtime: the config callback.
    VFM_DEVICE_COUNTER_CONFIG_TIME = 17,
    // Downtime, destination: the driver's check, and the start.
    VFM_DEVICE_COUNTER_RESUME_TIME = 18,
    // Load: bytes of data that channels have written themselves (VFM_SETTING_WRITER).
    VFM_DEVICE_COUNTER_WRITTEN_THROUGH = 19,
};

// A channel's counters, with `vfm_stats_channel`. Bytes, numbers, or times in nanoseconds.
enum vfm_channel_counter {
    // Bytes of device state, headers included.
    VFM_CHANNEL_COUNTER_BYTES = 0,
    // Packets of device state.
    VFM_CHANNEL_COUNTER_PACKETS = 1,
    // RAM packets.
    VFM_CHANNEL_COUNTER_RAM_PACKETS = 2,
    // SYNC packets.
    VFM_CHANNEL_COUNTER_SYNCS = 3,
    // How long it waited for the budget, or for a packet.
    VFM_CHANNEL_COUNTER_BLOCKED_TIME = 4,
};

// The devices of a VM, as far as its migration is concerned: one for each VM. Any thread. Free it with
// `vfm_blockers_free`.
struct vfm_blockers;

// Cancels one session or migration, from any thread, whatever other threads do in it. It may outlive what it
// cancels; then it does nothing. Made by `vfm_load_canceller` and its like; free it with `vfm_canceller_free`.
struct vfm_canceller;

// One connection of a migration, not yet in use. `vfm_…_add_channel` takes it out of its handle, and owns the
// connection from then on; the handle is freed with `vfm_channel_free` before or after.
struct vfm_channel;

// A device of the VM's. The handle stays the caller's; while a session or a migration has the device, other calls
// with it are refused, and when that has ended the device is there again. One whose driver is stuck never is:
// VFM_CODE_STUCK. Any thread, one at a time for each device. Free it with `vfm_device_free`.
struct vfm_device;

// Why a call failed. Any number of threads may read one; its owner frees it with `vfm_error_free`.
struct vfm_error;

// The destination's side of a migration of a VM's devices. One thread reads the main channel and walks it through its
// steps. Meanwhile any thread may add channels, look at counters, and cancel. Free it with `vfm_incoming_free`.
struct vfm_incoming;

// A load under way: devices, channels, and the threads that bring the one to the other. Any thread may call any
// function of it at any time, but for `vfm_load_free`; where a call says that it waits, others may be made
// meanwhile, but for those that end the session. Free it with `vfm_load_free`.
struct vfm_load;

// Reads a main channel event by event, and no byte beyond one. One thread at a time: a second is refused. Free it with
// `vfm_main_reader_free`.
struct vfm_main_reader;

// Writes a main channel. One thread at a time: a second is refused. Free it with `vfm_main_writer_free`.
struct vfm_main_writer;

// The source's side of a migration of a VM's devices. One thread at a time walks it through its steps; a second one
// is refused. Any thread may call `vfm_outgoing_ack_received`, `…_canceller` and `…_failure`. Free it with
// `vfm_outgoing_free`.
struct vfm_outgoing;

// Brings packets of one of the caller's own connections into a load. While there is one, the load's input has not
// ended. Only the thread that made it may use it: another is refused. That thread frees it, with
// `vfm_publisher_free`; or ends, which frees what it holds.
struct vfm_publisher;

// A relay under way, between two VMMs. The main channel is the caller's to pass on. Any thread. Free it with
// `vfm_relay_free`.
struct vfm_relay;

// A save under way: devices, channels, and the threads that bring the one to the other. Any thread may call any
// function of it at any time, but for `vfm_save_free`. Free it with `vfm_save_free`.
struct vfm_save;

// Everything that is set for a session or a migration. What is started with it copies it, so it can be changed and
// freed at any time. Any thread. Free it with `vfm_settings_free`.
struct vfm_settings;

// Counters, as they were when they were asked for. Any number of threads may read them. Free them with
// `vfm_stats_free`.
struct vfm_stats;

// The work of one thread. `vfm_task_run` runs it and frees it.
struct vfm_task;

// What is left in PRE_COPY, in bytes: `struct vfio_precopy_info`.
struct vfm_precopy {
    // What the destination should have before the switchover.
    uint64_t initial_bytes;
    // What has changed since it was read.
    uint64_t dirty_bytes;
    // New initial bytes have appeared. Only after `enable_precopy_info_v2`.
    bool reinit;
};

// Where bytes go. Passed by value. Who gets one calls `write` with its `opaque`.
struct vfm_output {
    // As write(2): returns how many bytes it has taken, 1 to `len`, or a negative errno. Must block: -EAGAIN is an
    // error. -EINTR is asked again. The library's own, which a callback is given, takes all of them.
    ptrdiff_t (*write)(void *opaque, const void *bytes, size_t len);
    // For `write`.
    void *opaque;
};

// Where bytes come from. Passed by value. Who gets one calls `read` with its `opaque`.
struct vfm_input {
    // As read(2): returns how many bytes it has put into `bytes`, 1 to `len`; 0 at the end; or a negative errno.
    // Must block: -EAGAIN is an error. -EINTR is asked again.
    ptrdiff_t (*read)(void *opaque, void *bytes, size_t len);
    // For `read`.
    void *opaque;
};

// A device in C. There are two kinds, and one of `set_state` and `open` is given:
//
// | | a device with states of its own | a device that the library keeps the states of |
// |---|---|---|
// | for | the kernel's, by the caller's own ioctls | a device model, a back-end in another process, a file |
// | has to have | flags, state, set_state, reset | open |
//
// All other functions may be NULL. `opaque` is passed to each. One thread at a time calls them: the library's
// thread for this device while packets move, the caller's in the functions of this header that concern the device;
// never the thread that moves the bytes. They may block; that device waits for them. They return 0, or a
// negative errno.
struct vfm_device_ops {
    // sizeof(struct vfm_device_ops), so that a later header may have more.
    size_t size;
    // Writes what the device can do, `VFM_FLAG_…`, once. With `open`: NULL is `VFM_FLAG_STOP_COPY`.
    int (*flags)(void *opaque, uint64_t *flags);
    // Writes the device's state (`enum vfm_state`). With `open`: asked once, RUNNING or STOP; NULL is RUNNING.
    int (*state)(void *opaque, uint32_t *state);
    // Sets a state, and nothing else: the library recovers a device that refuses. A data fd that comes with the
    // state is written to `data_fd`, which holds -1; it is the library's from then on. It must have `FD_CLOEXEC`
    // and not `O_NONBLOCK`.
    int (*set_state)(void *opaque, uint32_t state, int *data_fd);
    // Opens the data fd with which a save (PRE_COPY, STOP_COPY) or a load (RESUMING) begins. The rules are those
    // of `set_state`'s.
    int (*open)(void *opaque, uint32_t state, int *data_fd);
    // With `open`: the state changes; a refusal keeps it as it was. To check what was loaded: out of RESUMING.
    int (*change)(void *opaque, uint32_t from, uint32_t to);
    // Resets the device: afterwards it is RUNNING, and its content is gone. A failure loses the device. Of a kernel's
    // device: it has been reset, and its interrupts, its command register and its BARs have to be set again.
    int (*reset)(void *opaque);
    // Writes how many bytes STOP_COPY would give now. An estimate. NULL: the device cannot tell.
    int (*data_size)(void *opaque, uint64_t *bytes);
    // Writes what is left in PRE_COPY: `VFIO_MIG_GET_PRECOPY_INFO` on the data fd.
    int (*precopy_info)(void *opaque, int data_fd, struct vfm_precopy *info);
    // Asks the kernel for `reinit`. NULL, or -ENOTTY: it is not to be had.
    int (*enable_precopy_info_v2)(void *opaque);
    // Reads in PRE_COPY: a count, -ENOMSG where there is nothing for now, or another negative errno. NULL is
    // read(2), but with `open` a device that has PRE_COPY needs it.
    ptrdiff_t (*read_precopy)(void *opaque, int data_fd, void *bytes, size_t len);
    // Writes the config: what the VMM keeps of the device, opaque to the library. `output` is good during the
    // call, on its thread. NULL: the config is empty.
    int (*save_config)(void *opaque, struct vfm_output output);
    // Reads the config, exactly the bytes that `save_config` wrote and none more. `input` is good during the call, on
    // its thread; a read may return less than was asked for.
    int (*load_config)(void *opaque, struct vfm_input input);
    // The device is in `state` now; or, with `prepares`, PRE_COPY_P2P is about to be asked for. Only where
    // VFM_DEVICE_SETTING_EVENTS is on. Quick: the device's next call waits.
    void (*event)(void *opaque, uint32_t state, bool prepares);
    // The library is done with `opaque`: called once, whatever became of the device, unless a call is stuck in it.
    // Any thread.
    void (*release)(void *opaque);
};

// A connection that is no socket: TLS, say. The channel's thread calls all but `hangup`, one at a time.
struct vfm_stream_ops {
    // sizeof(struct vfm_stream_ops), so that a later header may have more.
    size_t size;
    // As of `vfm_input`. -EAGAIN is its own time-out, or says that it does not block: then it is asked again.
    ptrdiff_t (*read)(void *opaque, void *bytes, size_t len);
    // As of `vfm_output`. -EAGAIN as for `read`.
    ptrdiff_t (*write)(void *opaque, const void *bytes, size_t len);
    // Ends the sending side, with all that was written before: 0, or a negative errno. The peer then reads the end.
    // NULL: the peer reads the end when `release` closes the connection.
    int (*finish)(void *opaque);
    // Makes `read` and `write`, and the next ones, return soon. Any thread, while they run, and perhaps twice.
    void (*hangup)(void *opaque);
    // The library is done with `opaque`: called once, when no call is under way. Any thread.
    void (*release)(void *opaque);
};

// Takes the packets of a channel that RAM shares. The channel's thread calls, in the channel's order. What blocks
// here holds that channel up, and no other.
struct vfm_ram_ops {
    // sizeof(struct vfm_ram_ops), so that a later header may have more.
    size_t size;
    // A RAM packet: its header, and its pages, which `pages` gives and then ends. What is left unread is skipped.
    int (*ram)(void *opaque, const void *header, size_t header_len, struct vfm_input pages);
    // A SYNC packet. May block until all channels have had theirs.
    int (*sync)(void *opaque, const void *header, size_t header_len);
    // The library is done with `opaque`. Any thread.
    void (*release)(void *opaque);
};

// How a device is.
struct vfm_status {
    // What it can do: `VFM_FLAG_…`.
    uint64_t flags;
    // Its last known state: `enum vfm_state`.
    uint32_t state;
    // What is left to do: `enum vfm_duty`.
    uint32_t duty;
    // Whether it has been reset since its last migration was set up.
    bool was_reset;
    // Whether its reset has failed.
    bool is_lost;
};

// What a section's body held.
struct vfm_body {
    // Bytes of data.
    uint64_t data_len;
    // What ended it.
    enum vfm_piece_end end;
};

// An event of the main channel. What it points to is the reader's, until the next call with the reader.
struct vfm_event {
    // What it is: `enum vfm_event_code`.
    uint32_t kind;
    // Section: which part it is, `enum vfm_section_kind`.
    uint32_t section_kind;
    // Section: its number.
    uint32_t section_id;
    // Section: the instance id of its owner.
    uint32_t instance;
    // Section: the version of its body, 1 for a VFIO device.
    uint32_t version;
    // Command: its number, `VFM_COMMAND_…`.
    uint32_t command;
    // Command: the value of a PING.
    uint32_t value;
    // Section: the idstr of its owner. Configuration: the machine. Otherwise NULL.
    const char *name;
    // Description, and a command that has no name here: its bytes. Otherwise NULL.
    const void *payload;
    // How many.
    size_t payload_len;
};

// A message on the return path.
struct vfm_reply {
    // `VFM_REPLY_…`, or another number.
    uint16_t kind;
    // SHUT: 0 where all is loaded. PONG: the PING's.
    uint32_t value;
    // How long its payload is, where its kind has no name here.
    size_t payload_len;
    // There was none: the path has ended.
    bool ended;
};

// What an iteration has done.
struct vfm_round {
    // Bytes of the device's that were written, or sent; 0 where it has nothing for now.
    uint64_t bytes;
    // Whether this has told the destination that it has the initial data.
    bool init_data_sent;
};

// What is left to be sent, in bytes. No byte is in two of them.
struct vfm_left {
    // In PRE_COPY: what the destination should have before the switchover.
    uint64_t initial;
    // In PRE_COPY: what has changed since it was read.
    uint64_t dirty;
    // What only STOP_COPY gives. 0 before it was first asked for.
    uint64_t stop_copy;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Makes the list of a VM's devices. Any thread.
enum vfm_code vfm_blockers_new(struct vfm_blockers **blockers, struct vfm_error **error);

// Admits a device of the caller's callbacks, or says why not. `platform` is a set of `VFM_PLATFORM_…`; `enable` is
// VFM_DEVICE_SETTING_ENABLE's value.
//
// | the device | this | `device` |
// |---|---|---|
// | can be migrated | succeeds | the device |
// | blocks the VM's migration | calls `on_block` once, with the `enum vfm_refusal`, and succeeds | NULL: it works, and is not the library's |
// | has to be migrated, and cannot | fails with VFM_CODE_UNMIGRATABLE | not written |
//
// `on_block` should refuse the VM's migration until `vfm_blockers_remove`, and returns 0 or a negative errno, which fails
// this call; `block_opaque` is its. `opaque` and `ops` are as for `vfm_device_new`; `release` is called where the library
// does not keep the device. Any thread.
enum vfm_code vfm_blockers_admit(const struct vfm_blockers *blockers,
                                 const char *idstr,
                                 uint32_t instance,
                                 const struct vfm_device_ops *ops,
                                 void *opaque,
                                 uint32_t platform,
                                 uint64_t enable,
                                 int (*on_block)(void *block_opaque,
                                                 const char *idstr,
                                                 uint32_t instance,
                                                 uint32_t refusal),
                                 void *block_opaque,
                                 struct vfm_device **device,
                                 struct vfm_error **error);

// Removes a device that was unplugged. Writes whether it was there; `was_there` may be NULL. Any thread.
enum vfm_code vfm_blockers_remove(const struct vfm_blockers *blockers,
                                  const char *idstr,
                                  uint32_t instance,
                                  bool *was_there,
                                  struct vfm_error **error);

// Returns how many devices block the VM's migration now. Any thread.
size_t vfm_blockers_count(const struct vfm_blockers *blockers);

// Returns why this device blocks the VM's migration now: VFM_REFUSAL_NONE where it does not, or there is no such device.
// Any thread.
enum vfm_refusal vfm_blockers_refusal(const struct vfm_blockers *blockers,
                                      const char *idstr,
                                      uint32_t instance);

// Frees the list. Its devices are the caller's. NULL is nothing. Any thread, when no other uses it.
void vfm_blockers_free(struct vfm_blockers *blockers);

// Cancels: the calls that wait in the session or migration end, within the grace time, and later ones fail with
// VFM_CODE_CANCELLED. Does not wait. Any thread; not from a signal handler.
void vfm_canceller_cancel(const struct vfm_canceller *canceller);

// As `vfm_canceller_cancel`, for a reason of the caller's: a main channel that has broken, say. The first reason
// counts. `reason` stays the caller's. Any thread.
enum vfm_code vfm_canceller_fail(const struct vfm_canceller *canceller,
                                 const struct vfm_error *reason,
                                 struct vfm_error **error);

// Frees a canceller, and cancels nothing. NULL is nothing. Any thread.
void vfm_canceller_free(struct vfm_canceller *canceller);

// Makes a channel of a connected stream socket of any family. It is the library's from here on, which sets it to
// block, shuts it down and closes it; where this call fails it stays the caller's. The options that find a
// vanished host (SO_KEEPALIVE, TCP_USER_TIMEOUT) are the caller's to set. Any thread.
enum vfm_code vfm_channel_from_fd(int socket,
                                  struct vfm_channel **channel,
                                  struct vfm_error **error);

// Makes a channel of the caller's own stream. `opaque` is the library's until `release`, which is called also where
// this call fails, but for a NULL `ops`. Any thread.
enum vfm_code vfm_channel_from_stream(const struct vfm_stream_ops *ops,
                                      void *opaque,
                                      struct vfm_channel **channel,
                                      struct vfm_error **error);

// Hands the channel's RAM and SYNC packets to `ops`, for a load; without, a RAM packet is an error. `opaque` as for
// `vfm_channel_from_stream`. Any thread.
enum vfm_code vfm_channel_set_ram(const struct vfm_channel *channel,
                                  const struct vfm_ram_ops *ops,
                                  void *opaque,
                                  struct vfm_error **error);

// Sets the target's page size in bytes, on which RAM packets depend. Default: 4096. Where it is none, the channel is
// lost. Any thread.
enum vfm_code vfm_channel_set_page_size(const struct vfm_channel *channel,
                                        uint32_t bytes,
                                        struct vfm_error **error);

// Frees a channel, and closes the connection where nothing has taken it. NULL is nothing. Any thread.
void vfm_channel_free(struct vfm_channel *channel);

// Makes a device of the caller's callbacks, and asks it what it can do. `idstr` and `instance` are its name on the
// wire, the same on both ends: "0000:00:03.0/vfio" and 0, say. From this call on `opaque` is the library's, until
// `release`, which is called also where this call fails, but for a NULL `ops`. `ops` is copied. Any thread.
enum vfm_code vfm_device_new(const char *idstr,
                             uint32_t instance,
                             const struct vfm_device_ops *ops,
                             void *opaque,
                             struct vfm_device **device,
                             struct vfm_error **error);

// Makes a device of the kernel's, over the VFIO device fd that the VMM has: a group's or a cdev's. The library
// makes a duplicate of it; `fd` stays the caller's. From then on only the library sets the device's migration state.
// Of `ops`, which may be NULL, it uses `save_config`, `load_config`, `reset`, `event` and `release`. The rest is as
// for `vfm_device_new`. Any thread.
enum vfm_code vfm_device_from_vfio(const char *idstr,
                                   uint32_t instance,
                                   int fd,
                                   const struct vfm_device_ops *ops,
                                   void *opaque,
                                   struct vfm_device **device,
                                   struct vfm_error **error);

// Sets `setting` (`enum vfm_device_setting`), for the next migration.
enum vfm_code vfm_device_set(const struct vfm_device *device,
                             uint32_t setting,
                             uint64_t value,
                             struct vfm_error **error);

// Writes how the device is. Asks nobody.
enum vfm_code vfm_device_status(const struct vfm_device *device,
                                struct vfm_status *status,
                                struct vfm_error **error);

// Sets the device's state (`enum vfm_state`), outside of a migration. If it refuses, it is taken to `recover`, and
// reset where it refuses that too; VFM_STATE_ERROR resets it at once. Waits for the driver.
enum vfm_code vfm_device_set_state(const struct vfm_device *device,
                                   uint32_t state,
                                   uint32_t recover,
                                   struct vfm_error **error);

// Resets the device: it is RUNNING afterwards, and its content is lost. Waits for the driver.
enum vfm_code vfm_device_reset(const struct vfm_device *device, struct vfm_error **error);

// Frees a device's handle, and with it the device: its data fd is closed, it stays in its state, and its `release`
// is called. While a migration has the device, that happens when the migration is done with it. NULL is nothing.
void vfm_device_free(struct vfm_device *device);

// Stops devices that are at rest, after the VM's processors have stopped: all to their P2P state, then all to STOP,
// each step at once for all. `reason` is an `enum vfm_reason`. A device that refuses is reset and then stopped. Waits for the slowest driver. A
// migration's devices are stopped by `vfm_outgoing_stop_vm`.
enum vfm_code vfm_stop_devices(const struct vfm_device *const *devices,
                               size_t count,
                               uint32_t reason_to_stop,
                               struct vfm_error **error);

// Starts devices that are at rest, before the VM's processors start. If one refuses, all that were started are
// stopped again. Waits for the slowest driver. A migration's devices are started by `vfm_incoming_start_vm`.
enum vfm_code vfm_start_devices(const struct vfm_device *const *devices,
                                size_t count,
                                struct vfm_error **error);

// Makes an error of the caller's own, for the `…_fail` functions: why a migration ends that nothing in here has
// ended. `code` is one of VFM_CODE_CHANNEL, DEVICE, HOST, MISSING, STALLED and CANCELLED. Free it with
// `vfm_error_free`; `…_fail` does not take it.
//
// Any thread.
enum vfm_code vfm_error_new(uint32_t code,
                            const char *reason,
                            struct vfm_error **made,
                            struct vfm_error **error);

// Returns an error's code; VFM_CODE_OK for NULL. Any thread.
enum vfm_code vfm_error_code(const struct vfm_error *error);

// Returns what an error says, with its cause, in English, on one line. The text is the error's: it lives as long.
// For NULL it says that all is well. Any thread.
const char *vfm_error_text(const struct vfm_error *error);

// Returns the errno behind an error, or 0. Any thread.
int vfm_error_errno(const struct vfm_error *error);

// Returns where in the migration it happened: "setup", "receive", "load", "config", "save", "send", "section",
// "state" or "cleanup". A constant text. Any thread.
const char *vfm_error_phase(const struct vfm_error *error);

// Returns the idstr of the device that failed, or NULL where the error is no device's; writes its instance id.
// The text is the error's. `instance` may be NULL. Any thread.
const char *vfm_error_device(const struct vfm_error *error,
                             uint32_t *instance);

// Returns the channel that failed, in the order in which the channels were given, or -1. Any thread.
int64_t vfm_error_channel(const struct vfm_error *error);

// Returns the idx of the packet that failed, or is missing; or -1. Any thread.
int64_t vfm_error_index(const struct vfm_error *error);

// Returns whether the error is a state change's, and writes its two states (`enum vfm_state`): the one before,
// and the one that was asked for. Any thread.
bool vfm_error_states(const struct vfm_error *error,
                      uint32_t *from,
                      uint32_t *to);

// Returns why the device cannot be migrated, where that is the error. Any thread.
enum vfm_refusal vfm_error_refusal(const struct vfm_error *error);

// Frees an error. NULL is nothing. The owner's thread, when no other uses it.
void vfm_error_free(struct vfm_error *error);

// Makes the destination's side of a migration. `settings` is copied. Any thread.
enum vfm_code vfm_incoming_new(const struct vfm_settings *settings,
                               struct vfm_incoming **incoming,
                               struct vfm_error **error);

// Adds a device, before the set-up. The migration borrows it until its end. Any thread.
enum vfm_code vfm_incoming_add_device(const struct vfm_incoming *incoming,
                                      const struct vfm_device *device,
                                      struct vfm_error **error);

// Adds a channel, before the set-up or after it. Where no device uses the channels it is only closed. Any thread.
enum vfm_code vfm_incoming_add_channel(const struct vfm_incoming *incoming,
                                       const struct vfm_channel *channel,
                                       struct vfm_error **error);

// Sets what sends a switchover ack on the return path (`vfm_reply_write`): 0, or a negative errno. The thread that loads
// sections calls it. Needed with VFM_SETTING_SWITCHOVER_ACK, before the set-up. `release` is called when the library is
// done with `opaque`, also where this call fails; it may be NULL. Any thread.
enum vfm_code vfm_incoming_send_ack_with(const struct vfm_incoming *incoming,
                                         int (*send)(void *opaque),
                                         void *opaque,
                                         void (*release)(void *opaque),
                                         struct vfm_error **error);

// Sets the devices up: all go to RESUMING, all at once, and the channels are read from now on. Where this fails the
// migration is over, and the devices are back, as they were. Waits for the slowest driver.
enum vfm_code vfm_incoming_setup(const struct vfm_incoming *incoming,
                                 struct vfm_error **error);

// Loads the body of a section of the device with this name, up to the tag that ends it and not a byte more: for a VMM
// that reads its main channel itself. `body` may be NULL. A failure fails the migration. Waits for the main channel and
// the driver. The thread that reads the main channel.
enum vfm_code vfm_incoming_load_state(const struct vfm_incoming *incoming,
                                      const char *idstr,
                                      uint32_t instance,
                                      struct vfm_input input,
                                      struct vfm_body *body,
                                      struct vfm_error **error);

// The main channel's command SWITCHOVER_START has come: from now on packets are written to the devices. The thread that
// reads the main channel.
enum vfm_code vfm_incoming_switchover_start(const struct vfm_incoming *incoming,
                                            struct vfm_error **error);

// Makes a publisher, for packets that do not come over the channels: see `struct vfm_publisher`. Refused where no
// device uses the channels. It belongs to the calling thread.
enum vfm_code vfm_incoming_publisher(const struct vfm_incoming *incoming,
                                     struct vfm_publisher **publisher,
                                     struct vfm_error **error);

// No further channel will be added: what is missing then is an error. Any thread.
enum vfm_code vfm_incoming_no_more_channels(const struct vfm_incoming *incoming, struct vfm_error **error);

// Fails the migration for a reason of the caller's, a main channel that broke, say. The first reason counts.
// `reason` stays the caller's. Any thread.
enum vfm_code vfm_incoming_fail(const struct vfm_incoming *incoming,
                                const struct vfm_error *reason,
                                struct vfm_error **error);

// Returns why the migration has failed, if it has: VFM_CODE_OK and no error while it has not. Any thread.
enum vfm_code vfm_incoming_failure(const struct vfm_incoming *incoming, struct vfm_error **error);

// Returns whether every device is loaded, or the migration has failed: then `vfm_incoming_finish` returns soon. Any
// thread.
bool vfm_incoming_is_finished(const struct vfm_incoming *incoming);

// Returns the eventfd of the session that receives, between `vfm_incoming_setup` and `…_finish`, where a device uses
// the channels; otherwise -1. As `vfm_load_eventfd`. Any thread.
int vfm_incoming_eventfd(const struct vfm_incoming *incoming);

// Makes a copy of the counters as they are now, from the set-up on. Any thread.
enum vfm_code vfm_incoming_stats(const struct vfm_incoming *incoming,
                                 struct vfm_stats **stats,
                                 struct vfm_error **error);

// Makes a handle that cancels the migration until it is loaded. Any thread.
enum vfm_code vfm_incoming_canceller(const struct vfm_incoming *incoming,
                                     struct vfm_canceller **canceller,
                                     struct vfm_error **error);

// Waits until every device is loaded: call it when the main channel has been read to its end. On success start the
// VM, with `vfm_incoming_start_vm`. On failure the devices are back, reset, as at set-up, and the verdict to the source
// is a failure.
enum vfm_code vfm_incoming_finish(const struct vfm_incoming *incoming,
                                  struct vfm_error **error);

// Starts the devices, in which the drivers check what was loaded. Send the verdict after it: the VM runs here where this
// succeeds. Where it fails every device has been reset and stopped: `vfm_incoming_abort` gives them back. Waits for the
// slowest driver.
enum vfm_code vfm_incoming_start_vm(const struct vfm_incoming *incoming,
                                    struct vfm_error **error);

// Ends a migration that has succeeded, when the verdict has been sent, and gives the devices back. An error is a
// channel's; the devices are loaded nevertheless. Waits for the channels' end, within VFM_SETTING_NO_PROGRESS.
enum vfm_code vfm_incoming_join(const struct vfm_incoming *incoming,
                                struct vfm_error **error);

// Ends the migration at any step, and gives the devices back, reset: as at set-up, or stopped where they were loaded
// already. The verdict to the source is a failure. Waits for what is under way, within the grace time, and the drivers.
enum vfm_code vfm_incoming_abort(const struct vfm_incoming *incoming,
                                 struct vfm_error **error);

// Frees a migration. One that has not been joined is aborted. NULL is nothing. No other thread may be in a call with
// it.
void vfm_incoming_free(struct vfm_incoming *incoming);

// Makes a load, to which devices and channels are added before `vfm_load_start`. `settings` is copied. Any thread.
enum vfm_code vfm_load_new(const struct vfm_settings *settings,
                           struct vfm_load **load,
                           struct vfm_error **error);

// Adds a device, which the load borrows until its end. Once started, this is a plug: it waits until the device is
// in RESUMING, and VFM_SETTING_MAX_DEVICES must have room for it. If the load fails, the device goes back to the
// state in which it is now. Any thread.
enum vfm_code vfm_load_add_device(const struct vfm_load *load,
                                  const struct vfm_device *device,
                                  struct vfm_error **error);

// Adds a channel, before the start or after it. Any thread.
enum vfm_code vfm_load_add_channel(const struct vfm_load *load,
                                   const struct vfm_channel *channel,
                                   struct vfm_error **error);

// Starts the load: allocates its memory, starts its threads, and sets all devices to RESUMING, all at once. Waits
// for the slowest driver. If it fails the load is over, and the devices are back, in the state in which they came. Any
// thread.
enum vfm_code vfm_load_start(const struct vfm_load *load,
                             struct vfm_error **error);

// Removes a device: an unplug. Its handle has it again, reset, in the state in which it came; packets that still
// come for it are counted and skipped. Waits for its driver, for the grace time at most. Any thread.
enum vfm_code vfm_load_remove_device(const struct vfm_load *load,
                                     const struct vfm_device *device,
                                     struct vfm_error **error);

// No further channel will be added: what is missing then is an error. Any thread.
enum vfm_code vfm_load_no_more_channels(const struct vfm_load *load, struct vfm_error **error);

// Starts the switchover: from now on packets are written to the devices. Any thread.
enum vfm_code vfm_load_switchover_start(const struct vfm_load *load, struct vfm_error **error);

// Writes data of the device's section of the main channel into the device, before the switchover. Waits for its
// driver. Any thread, one at a time for each device.
enum vfm_code vfm_load_write_iterable(const struct vfm_load *load,
                                      const struct vfm_device *device,
                                      const void *data,
                                      size_t len,
                                      struct vfm_error **error);

// The main channel has said that the device's config may be loaded. Any thread.
enum vfm_code vfm_load_config_ready(const struct vfm_load *load,
                                    const struct vfm_device *device,
                                    struct vfm_error **error);

// Makes a publisher, for packets that do not come over the load's channels: see `struct vfm_publisher`. It belongs to
// the calling thread.
enum vfm_code vfm_load_publisher(const struct vfm_load *load,
                                 struct vfm_publisher **publisher,
                                 struct vfm_error **error);

// Makes a handle that cancels the load. Any thread.
enum vfm_code vfm_load_canceller(const struct vfm_load *load,
                                 struct vfm_canceller **canceller,
                                 struct vfm_error **error);

// Returns why the load has failed, if it has: VFM_CODE_OK and no error while it has not. Any thread.
enum vfm_code vfm_load_failure(const struct vfm_load *load, struct vfm_error **error);

// Returns whether every device is loaded, or the load has failed and its threads have ended: then `vfm_load_join`
// returns soon. Any thread.
bool vfm_load_is_finished(const struct vfm_load *load);

// Returns an eventfd that is readable when a device or a thread has ended, or the load has failed; -1 where it is not
// running. It is the load's, until its end: poll it, read its 8 bytes, then ask `vfm_load_failure` and
// `vfm_load_is_finished`. Any thread.
int vfm_load_eventfd(const struct vfm_load *load);

// Makes a copy of the counters as they are now, or as they were at the end. Any thread.
enum vfm_code vfm_load_stats(const struct vfm_load *load, struct vfm_stats **stats, struct vfm_error **error);

// Waits until every device is loaded, or the load has failed; then the devices are back, in STOP
// (VFM_SETTING_STOP_AFTER_LOAD). This is what the downtime waits for; the channels may still be open. It succeeds
// where the load has not failed. Any thread.
enum vfm_code vfm_load_wait_devices(const struct vfm_load *load,
                                    struct vfm_error **error);

// As `vfm_load_wait_devices`, and waits for the channels' end too, within VFM_SETTING_NO_PROGRESS. The load is over
// then. It returns the load's first failure. Any thread, once.
enum vfm_code vfm_load_join(const struct vfm_load *load,
                            struct vfm_error **error);

// Ends what is under way, and gives the devices back, within the grace time. Any thread, once.
enum vfm_code vfm_load_cleanup(const struct vfm_load *load, struct vfm_error **error);

// Returns how the device's part of the load went, once the device is back: it may have succeeded in a load that
// failed. Any thread.
enum vfm_code vfm_load_device_result(const struct vfm_load *load,
                                     const struct vfm_device *device,
                                     struct vfm_error **error);

// Frees a load. One that runs is cancelled first, which waits as `vfm_load_join` does after a cancellation; its
// devices are back then. NULL is nothing. No other thread may be in a call with it.
void vfm_load_free(struct vfm_load *load);

// Opens a main channel for reading, and reads its first eight bytes. `input` must be good until the reader is freed.
// `incoming` may be NULL; otherwise the reader refuses sections of its devices, and a switchover, where they may not
// stand. Waits for the bytes. Any thread.
enum vfm_code vfm_main_reader_open(struct vfm_input input,
                                   const struct vfm_incoming *incoming,
                                   struct vfm_main_reader **reader,
                                   struct vfm_error **error);

// Reads the next event. Waits for its bytes. A caller who expects no description stops at VFM_EVENT_CODE_EOF: the
// connection may stay open behind it.
enum vfm_code vfm_main_reader_next(const struct vfm_main_reader *reader,
                                   struct vfm_event *event,
                                   struct vfm_error **error);

// Loads the body of the section whose header was read last into its device, and reads its footer. `body` may be NULL.
// Refused for a section of another owner's. Waits for the main channel and the driver.
enum vfm_code vfm_main_reader_load(const struct vfm_main_reader *reader,
                                   const struct vfm_incoming *incoming,
                                   struct vfm_body *body,
                                   struct vfm_error **error);

// Reads from the body of the section whose header was read last, as read(2): writes to `count` how many bytes. Only
// the section's owner knows where its body ends; `vfm_main_reader_footer` follows. Waits for a byte.
enum vfm_code vfm_main_reader_read(const struct vfm_main_reader *reader,
                                   void *data,
                                   size_t len,
                                   size_t *count,
                                   struct vfm_error **error);

// Reads the footer of the section whose body has been read with `vfm_main_reader_read` or by its owner.
enum vfm_code vfm_main_reader_footer(const struct vfm_main_reader *reader, struct vfm_error **error);

// Frees a reader. Its input is the caller's. NULL is nothing. The thread that reads.
void vfm_main_reader_free(struct vfm_main_reader *reader);

// Opens a main channel for writing, and writes its first eight bytes. `output` must be good until the writer is
// freed. What stands in a section's body may be written to `output` itself. Any thread.
enum vfm_code vfm_main_writer_open(struct vfm_output output,
                                   struct vfm_main_writer **writer,
                                   struct vfm_error **error);

// Writes the machine's name, first of all: 255 bytes at most.
enum vfm_code vfm_main_writer_configuration(const struct vfm_main_writer *writer,
                                            const char *machine,
                                            struct vfm_error **error);

// Writes a section's header: of a device, or of another owner's. `kind` is an `enum vfm_section_kind`. The body follows
// on the writer's output, then `vfm_main_writer_footer`. `vfm_outgoing_section` writes all three.
enum vfm_code vfm_main_writer_section(const struct vfm_main_writer *writer,
                                      uint32_t kind,
                                      uint32_t id,
                                      const char *idstr,
                                      uint32_t instance,
                                      uint32_t version,
                                      struct vfm_error **error);

// Writes the footer of section `id`.
enum vfm_code vfm_main_writer_footer(const struct vfm_main_writer *writer,
                                     uint32_t id,
                                     struct vfm_error **error);

// Writes a command. OPEN_RETURN_PATH and SWITCHOVER_START have no payload, a PING has 4 bytes, big-endian; 65535 bytes
// at most.
enum vfm_code vfm_main_writer_command(const struct vfm_main_writer *writer,
                                      uint16_t command,
                                      const void *payload,
                                      size_t len,
                                      struct vfm_error **error);

// Writes the end of the VM's state, after `vfm_outgoing_finish` and never before: with it the destination may start the
// VM.
enum vfm_code vfm_main_writer_eof(const struct vfm_main_writer *writer,
                                  struct vfm_error **error);

// Writes the description that may follow the end: 1 MiB at most.
enum vfm_code vfm_main_writer_description(const struct vfm_main_writer *writer,
                                          const void *json,
                                          size_t len,
                                          struct vfm_error **error);

// Frees a writer. Its output is the caller's. NULL is nothing. The thread that writes.
void vfm_main_writer_free(struct vfm_main_writer *writer);

// Writes a message to the return path: `kind` is `VFM_REPLY_…`; `value` is SHUT's or PONG's. Any thread.
enum vfm_code vfm_reply_write(struct vfm_output output,
                              uint16_t kind,
                              uint32_t value,
                              struct vfm_error **error);

// Reads the next message of the return path, and no byte beyond it. The payload of one that has no name here is put into
// `payload`, as much of it as `room` bytes hold; both may be 0. Waits for the bytes. Any thread.
enum vfm_code vfm_reply_read(struct vfm_input input,
                             struct vfm_reply *reply,
                             void *payload,
                             size_t room_len,
                             struct vfm_error **error);

// Makes the source's side of a migration. `settings` is copied. Any thread.
enum vfm_code vfm_outgoing_new(const struct vfm_settings *settings,
                               struct vfm_outgoing **outgoing,
                               struct vfm_error **error);

// Adds a channel, before `vfm_outgoing_greet`.
enum vfm_code vfm_outgoing_add_channel(const struct vfm_outgoing *outgoing,
                                       const struct vfm_channel *channel,
                                       struct vfm_error **error);

// Greets the channels, when the migration is set up: the destination does not wait for it for long. Waits for the
// sockets. A migration whose devices use no channels does without.
enum vfm_code vfm_outgoing_greet(const struct vfm_outgoing *outgoing,
                                 struct vfm_error **error);

// Sets a device's migration up, and writes the body of its START section. The migration borrows the device until its
// end. Where this fails the device is back, as it was. Waits for the driver.
enum vfm_code vfm_outgoing_setup_device(const struct vfm_outgoing *outgoing,
                                        const struct vfm_device *device,
                                        struct vfm_output body,
                                        struct vfm_error **error);

// Writes the body of a PART section, while the VM runs: reads from the device once, and never waits for more. With
// VFM_SETTING_PRECOPY_OVER_CHANNELS the data is sent over the channels instead. `round` may be NULL. Waits for the
// driver, the main channel, and a channel.
enum vfm_code vfm_outgoing_iterate(const struct vfm_outgoing *outgoing,
                                   const struct vfm_device *device,
                                   struct vfm_output body,
                                   struct vfm_round *round,
                                   struct vfm_error **error);

// Writes what a device has left to send; of all devices together where `device` is NULL. With `exact` it asks the
// drivers and waits for them; otherwise it says what they said last, less what has been read since. The VM can stop
// when the sum of the three fits its downtime limit.
enum vfm_code vfm_outgoing_pending(const struct vfm_outgoing *outgoing,
                                   const struct vfm_device *device,
                                   bool exact,
                                   struct vfm_left *left,
                                   struct vfm_error **error);

// Returns whether all devices let the switchover happen: the acks that they asked for have come. False while another
// thread is in a call with it.
bool vfm_outgoing_is_switchover_ready(const struct vfm_outgoing *outgoing);

// A switchover ack has come on the return path. Any thread.
void vfm_outgoing_ack_received(const struct vfm_outgoing *outgoing);

// Makes the memory and the ring of the switchover, while the VM still runs: without, `vfm_outgoing_begin` makes them in
// the downtime.
enum vfm_code vfm_outgoing_prepare(const struct vfm_outgoing *outgoing,
                                   struct vfm_error **error);

// Stops the migration's devices, after the VM's processors have stopped: all to their P2P state, then all to STOP or
// STOP_COPY. `reason` is an `enum vfm_reason`; another one than VFM_REASON_FINISH_MIGRATION pauses the VM. Waits for
// the slowest driver.
enum vfm_code vfm_outgoing_stop_vm(const struct vfm_outgoing *outgoing,
                                   uint32_t reason_to_stop,
                                   struct vfm_error **error);

// Starts the migration's devices again, whose VM was paused. Waits for the slowest driver.
enum vfm_code vfm_outgoing_start_vm(const struct vfm_outgoing *outgoing, struct vfm_error **error);

// Begins the switchover: the devices that use the channels are read from and sent from now on. Where this fails the
// migration is over, and the devices are back, as at set-up. Waits for memory and the slowest driver.
enum vfm_code vfm_outgoing_begin(const struct vfm_outgoing *outgoing,
                                 struct vfm_error **error);

// Writes the body of a device's END section, after SWITCHOVER_START. Waits for the main channel; and for the driver,
// where the device does not use the channels. After a failure `vfm_outgoing_finish` gives the devices back.
enum vfm_code vfm_outgoing_write_state(const struct vfm_outgoing *outgoing,
                                       const struct vfm_device *device,
                                       struct vfm_output body,
                                       struct vfm_error **error);

// Writes the body of a device's FULL section, after its END. As `vfm_outgoing_write_state`.
enum vfm_code vfm_outgoing_write_config(const struct vfm_outgoing *outgoing,
                                        const struct vfm_device *device,
                                        struct vfm_output body,
                                        struct vfm_error **error);

// Writes a whole section of the device: its header, its body as the functions above do, its footer. `kind` is an `enum
// vfm_section_kind`: START sets the device up, PART iterates, END has its state, FULL its config. `id` is the section's
// number, one for each device.
enum vfm_code vfm_outgoing_section(const struct vfm_outgoing *outgoing,
                                   const struct vfm_main_writer *main,
                                   uint32_t kind,
                                   uint32_t id,
                                   const struct vfm_device *device,
                                   struct vfm_error **error);

// Fails the switchover for a reason of the caller's, a main channel that broke, say; `vfm_outgoing_finish` then gives
// the devices back. The first reason counts. `reason` stays the caller's.
enum vfm_code vfm_outgoing_fail(const struct vfm_outgoing *outgoing,
                                const struct vfm_error *reason,
                                struct vfm_error **error);

// Waits until everything is sent. On success the devices stay in STOP_COPY: write the main channel's end, wait for the
// verdict, and call `…_cleanup`, `…_abort` or `…_in_doubt`. On failure the devices are back, as at set-up, the VM goes
// on here, and the end must not be written.
enum vfm_code vfm_outgoing_finish(const struct vfm_outgoing *outgoing,
                                  struct vfm_error **error);

// The verdict: the VM runs on the destination. Takes the devices to STOP, closes the channels, and gives the devices
// back. An error is a device's that refused; it was reset and stopped. Waits for the slowest driver, and a second at
// most for the channels.
enum vfm_code vfm_outgoing_cleanup(const struct vfm_outgoing *outgoing,
                                   struct vfm_error **error);

// Ends the migration at any step, and gives the devices back, as at set-up: the VM goes on here. After
// `vfm_outgoing_finish` only where the destination has said that it failed, or the main channel's end was never
// written. Waits for what is under way, within the grace time, and for the drivers.
enum vfm_code vfm_outgoing_abort(const struct vfm_outgoing *outgoing,
                                 struct vfm_error **error);

// No verdict was heard, and none will be: the VM may run on the destination, so it must not run here. Takes the devices
// to STOP, with what they hold, and gives them back. `vfm_start_devices` lets the VM go on here, once it is known that it
// does not run there.
enum vfm_code vfm_outgoing_in_doubt(const struct vfm_outgoing *outgoing,
                                    struct vfm_error **error);

// Returns why the migration has failed, if it has: a cancellation, a channel that the destination has ended, what the
// switchover met. Look before the VM stops. VFM_CODE_OK and no error while it has not. Any thread; while another one is in
// a call it knows of cancellations only.
enum vfm_code vfm_outgoing_failure(const struct vfm_outgoing *outgoing,
                                   struct vfm_error **error);

// Returns whether everything that the channels carry has been sent, or the switchover has failed: then
// `vfm_outgoing_finish` returns soon.
bool vfm_outgoing_is_finished(const struct vfm_outgoing *outgoing);

// Returns the eventfd of the session that sends, between `vfm_outgoing_begin` and `…_finish`, where a device uses the
// channels; otherwise -1. As `vfm_load_eventfd`.
int vfm_outgoing_eventfd(const struct vfm_outgoing *outgoing);

// Makes a copy of the counters, from `vfm_outgoing_begin` on.
enum vfm_code vfm_outgoing_stats(const struct vfm_outgoing *outgoing,
                                 struct vfm_stats **stats,
                                 struct vfm_error **error);

// Makes a handle that cancels the migration, whatever step it is at. Once everything is sent it does nothing: then
// the verdict decides. Any thread.
enum vfm_code vfm_outgoing_canceller(const struct vfm_outgoing *outgoing,
                                     struct vfm_canceller **canceller,
                                     struct vfm_error **error);

// Frees a migration. One that is under way is aborted; one that is finished and has heard no verdict is left in doubt.
// NULL is nothing. No other thread may be in a call with it.
void vfm_outgoing_free(struct vfm_outgoing *outgoing);

// Publishes a packet of the device with this name. `payload` is the packet's payload as on the wire: its header of 12
// bytes, then its data. It is copied. Waits while the budget is spent, but not for the packet that the device needs
// next. A packet that breaks a rule fails the load.
enum vfm_code vfm_publisher_push(const struct vfm_publisher *publisher,
                                 const char *idstr,
                                 uint32_t instance,
                                 const void *payload,
                                 size_t len,
                                 struct vfm_error **error);

// As `vfm_publisher_push`, but never waits: writes to `pushed` whether there was memory for it. Where there was not,
// nothing is kept.
enum vfm_code vfm_publisher_try_push(const struct vfm_publisher *publisher,
                                     const char *idstr,
                                     uint32_t instance,
                                     const void *payload,
                                     size_t len,
                                     bool *pushed,
                                     struct vfm_error **error);

// Leases memory for a packet of `len` bytes of data, to be filled in place: `*data` is its first byte, or NULL where
// `wait` is false and there is none now. Fill all of it, on this thread, then call `vfm_publisher_publish`; or
// `vfm_publisher_release` to give it back. Until then this publisher does nothing else. `index` and `config` are those
// of the packet's header. With `len` 0 `*data` is not NULL, and there is nothing to fill.
enum vfm_code vfm_publisher_lease(const struct vfm_publisher *publisher,
                                  const char *idstr,
                                  uint32_t instance,
                                  uint32_t index,
                                  bool config,
                                  size_t len,
                                  bool wait,
                                  void **data,
                                  struct vfm_error **error);

// Publishes the packet that was leased. The lease is over, also where this fails.
enum vfm_code vfm_publisher_publish(const struct vfm_publisher *publisher, struct vfm_error **error);

// Gives the leased memory back; the packet may be leased or pushed again.
enum vfm_code vfm_publisher_release(const struct vfm_publisher *publisher, struct vfm_error **error);

// Frees a publisher, and gives back what it leases. NULL is nothing. Its own thread; on another one it only frees
// the handle, and the load's input stays open until the publisher's thread ends.
void vfm_publisher_free(struct vfm_publisher *publisher);

// Starts a relay; VFM_SETTING_CHANNELS says how many channels it has. Any thread.
enum vfm_code vfm_relay_start(const struct vfm_settings *settings,
                              struct vfm_relay **relay,
                              struct vfm_error **error);

// Adds a pair of channels: what comes from `source` goes to `destination`. Both are the relay's. Any thread.
enum vfm_code vfm_relay_add_channel(const struct vfm_relay *relay,
                                    const struct vfm_channel *source,
                                    const struct vfm_channel *destination,
                                    struct vfm_error **error);

// No further pair will be added. Any thread.
enum vfm_code vfm_relay_no_more_channels(const struct vfm_relay *relay, struct vfm_error **error);

// Returns why the relay has failed, if it has: VFM_CODE_OK and no error while it has not. Any thread.
enum vfm_code vfm_relay_failure(const struct vfm_relay *relay, struct vfm_error **error);

// Returns whether `vfm_relay_join` returns soon. Any thread.
bool vfm_relay_is_finished(const struct vfm_relay *relay);

// Returns an eventfd, as `vfm_load_eventfd` does. Any thread.
int vfm_relay_eventfd(const struct vfm_relay *relay);

// Makes a copy of the counters as they are now, or as they were at the end. Any thread.
enum vfm_code vfm_relay_stats(const struct vfm_relay *relay,
                              struct vfm_stats **stats,
                              struct vfm_error **error);

// Makes a handle that cancels the relay. Any thread.
enum vfm_code vfm_relay_canceller(const struct vfm_relay *relay,
                                  struct vfm_canceller **canceller,
                                  struct vfm_error **error);

// Waits until everything has been passed on, or the relay has failed, and closes the channels. It returns the first
// failure. Any thread, once.
enum vfm_code vfm_relay_join(const struct vfm_relay *relay,
                             struct vfm_error **error);

// Frees a relay. One that runs is cancelled first. NULL is nothing. No other thread may be in a call with it.
void vfm_relay_free(struct vfm_relay *relay);

// Makes a save, to which devices and channels are added before `vfm_save_start`. `settings` is copied. Any thread.
enum vfm_code vfm_save_new(const struct vfm_settings *settings,
                           struct vfm_save **save,
                           struct vfm_error **error);

// Adds a device, which the save borrows until `vfm_save_stop_devices`, `vfm_save_put_back` or `vfm_save_free`. Before
// the start. Any thread.
enum vfm_code vfm_save_add_device(const struct vfm_save *save,
                                  const struct vfm_device *device,
                                  struct vfm_error **error);

// Adds a channel, which is greeted at the start. Before the start. Any thread.
enum vfm_code vfm_save_add_channel(const struct vfm_save *save,
                                   const struct vfm_channel *channel,
                                   struct vfm_error **error);

// Starts the save, when the VM stands still: allocates its memory, starts its threads, and sets all devices to
// STOP_COPY, all at once. Waits for the slowest driver. If it fails the save is over, and the devices are back, in
// the state in which they came. Any thread.
enum vfm_code vfm_save_start(const struct vfm_save *save,
                             struct vfm_error **error);

// Makes a handle that cancels the save. Any thread.
enum vfm_code vfm_save_canceller(const struct vfm_save *save,
                                 struct vfm_canceller **canceller,
                                 struct vfm_error **error);

// Returns why the save has failed, if it has: VFM_CODE_OK and no error while it has not. Any thread.
enum vfm_code vfm_save_failure(const struct vfm_save *save, struct vfm_error **error);

// Returns whether all has been sent, or the save has failed and its threads have ended: then `vfm_save_join` returns
// soon. Any thread.
bool vfm_save_is_finished(const struct vfm_save *save);

// Returns an eventfd, as `vfm_load_eventfd` does. Any thread.
int vfm_save_eventfd(const struct vfm_save *save);

// Makes a copy of the counters as they are now, or as they were at the end. Any thread.
enum vfm_code vfm_save_stats(const struct vfm_save *save, struct vfm_stats **stats, struct vfm_error **error);

// Waits until all has been sent, or the save has failed, and returns its first failure. After a failure the devices
// are back, in the state in which they came. After a success they stay in STOP_COPY, until it is known where the VM
// runs: then `vfm_save_stop_devices` or `vfm_save_put_back`. The channels stay open until then. Any thread, once.
enum vfm_code vfm_save_join(const struct vfm_save *save,
                            struct vfm_error **error);

// As `vfm_save_join`, but ends what is still under way, within the grace time. Any thread, once.
enum vfm_code vfm_save_cleanup(const struct vfm_save *save, struct vfm_error **error);

// The VM runs on the destination: takes the devices to STOP, closes the channels, and gives the devices back.
// `vfm_save_device_result` says how it went. Waits for the slowest driver. Any thread, once.
enum vfm_code vfm_save_stop_devices(const struct vfm_save *save, struct vfm_error **error);

// The destination has failed, and the VM goes on here: takes the devices back to the state in which they came, and
// gives them back. Waits for the slowest driver. Any thread, once.
enum vfm_code vfm_save_put_back(const struct vfm_save *save,
                                struct vfm_error **error);

// Returns how the device's part of the save went, once the device is back. Any thread.
enum vfm_code vfm_save_device_result(const struct vfm_save *save,
                                     const struct vfm_device *device,
                                     struct vfm_error **error);

// Frees a save. One that runs is cancelled first. Devices that are not back come back, in the state in which they
// are: STOP_COPY, after a success. NULL is nothing. No other thread may be in a call with it.
void vfm_save_free(struct vfm_save *save);

// Makes settings, all at their defaults. Any thread.
enum vfm_code vfm_settings_new(struct vfm_settings **settings, struct vfm_error **error);

// Frees settings. NULL is nothing. Any thread.
void vfm_settings_free(struct vfm_settings *settings);

// Sets `setting` (`enum vfm_setting`). A value that cannot be is refused here, or by `vfm_settings_check` and what
// is started. Any thread.
enum vfm_code vfm_settings_set(const struct vfm_settings *settings,
                               uint32_t setting,
                               uint64_t value,
                               struct vfm_error **error);

// Sets the VM's uuid, 16 bytes, which both ends' hellos have. Default: all zero. Any thread.
enum vfm_code vfm_settings_set_uuid(const struct vfm_settings *settings,
                                    const void *uuid,
                                    struct vfm_error **error);

// Spills to a file without a name in this directory, from all channels. Any thread.
enum vfm_code vfm_settings_spill_to(const struct vfm_settings *settings,
                                    const char *directory,
                                    struct vfm_error **error);

// Refuses what no session can do on this host: what a start would refuse. Any thread.
enum vfm_code vfm_settings_check(const struct vfm_settings *settings, struct vfm_error **error);

// Writes the most memory that a load with these settings takes, in bytes, whatever the source sends. Any thread.
enum vfm_code vfm_settings_memory_bound(const struct vfm_settings *settings,
                                        uint32_t devices,
                                        uint32_t channels,
                                        uint64_t *bound,
                                        struct vfm_error **error);

// Runs all the library's work on threads of the caller's: `spawn` is called for each task, on any thread. It
// starts a thread that calls `vfm_task_run(task)`, and returns 0 without waiting for it; or it does nothing with
// the task, and returns a negative errno. `release` is called when the library is done with `opaque`, also where
// this call fails; it may be NULL. Any thread.
enum vfm_code vfm_settings_spawn_with(const struct vfm_settings *settings,
                                      int (*spawn_task)(void *opaque, struct vfm_task *task),
                                      void *opaque,
                                      void (*release)(void *opaque),
                                      struct vfm_error **error);

// Runs a task on the calling thread, and frees it. Returns when its work is done. NULL is nothing. The thread that
// was made for it.
void vfm_task_run(struct vfm_task *task);

// Returns what a task does. Before it is run, on the thread that has it.
enum vfm_task_kind vfm_task_kind(const struct vfm_task *task);

// Returns a name for a task's thread, of 15 bytes at most: the task's text. Before it is run, on the thread that has
// it.
const char *vfm_task_name(const struct vfm_task *task);

// Returns a counter (`enum vfm_counter`); 0 for one that is none. Any thread.
uint64_t vfm_stats_get(const struct vfm_stats *stats, uint32_t which);

// Returns how many devices there are. Any thread.
size_t vfm_stats_devices(const struct vfm_stats *stats);

// Returns the idstr of device `at`, counted from 0, and writes its instance id; NULL for one that is none. The text
// is the handle's. `instance` may be NULL. Any thread.
const char *vfm_stats_device_name(const struct vfm_stats *stats,
                                  size_t at,
                                  uint32_t *instance);

// Returns a counter (`enum vfm_device_counter`) of device `at`; 0 for one that is none. Any thread.
uint64_t vfm_stats_device(const struct vfm_stats *stats, size_t at, uint32_t which);

// Returns how many channels there are. Any thread.
size_t vfm_stats_channels(const struct vfm_stats *stats);

// Returns a counter (`enum vfm_channel_counter`) of channel `at`; 0 for one that is none. Any thread.
uint64_t vfm_stats_channel(const struct vfm_stats *stats, size_t at, uint32_t which);

// Returns what moves the bytes: "uring", "blocking", or "main channel" where no device uses the channels. The
// text is the handle's; NULL for NULL. Any thread.
const char *vfm_stats_backend(const struct vfm_stats *stats);

// Frees counters. NULL is nothing. Any thread.
void vfm_stats_free(struct vfm_stats *stats);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* VFIO_MIGRATION_H */
