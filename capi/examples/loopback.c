/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
 *
 * A VM with two devices moves from a source to a destination, both in this process: the devices are callbacks, the
 * connections socket pairs. A VMM puts its own in their places. Build it with
 *
 *     cc loopback.c $(pkg-config --cflags --libs vfio-migration) -lpthread
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <vfio_migration.h>

enum { DEVICES = 2, CHANNELS = 2, STATE = 3000000, CONFIG = 64 };

/* ---- a device: its state is a memfd, of which the library gets a descriptor of its own */

struct nic {
    unsigned char config[CONFIG];
    int state;
};

static int nic_flags(void *opaque, uint64_t *flags)
{
    *flags = VFM_FLAG_STOP_COPY | VFM_FLAG_P2P;
    return opaque ? 0 : -EINVAL;
}

static int nic_open(void *opaque, uint32_t state, int *data_fd)
{
    struct nic *nic = opaque;
    if (state == VFM_STATE_RESUMING && ftruncate(nic->state, 0))
        return -errno;
    *data_fd = fcntl(nic->state, F_DUPFD_CLOEXEC, 0);
    return *data_fd < 0 || lseek(nic->state, 0, SEEK_SET) < 0 ? -errno : 0;
}

static int nic_save_config(void *opaque, struct vfm_output out)
{
    ptrdiff_t n = out.write(out.opaque, ((struct nic *)opaque)->config, CONFIG);
    return n < 0 ? (int)n : 0;
}

static int nic_load_config(void *opaque, struct vfm_input in)
{
    for (size_t at = 0; at < CONFIG;) {
        ptrdiff_t n = in.read(in.opaque, ((struct nic *)opaque)->config + at, CONFIG - at);
        if (n <= 0)
            return n ? (int)n : -ENODATA;
        at += (size_t)n;
    }
    return 0;
}

static const struct vfm_device_ops nic_ops = {
    .size = sizeof nic_ops, .flags = nic_flags, .open = nic_open,
    .save_config = nic_save_config, .load_config = nic_load_config,
};

/* ---- the main channel's bytes */
static ptrdiff_t main_read(void *opaque, void *bytes, size_t len)
{
    ssize_t n = read(*(int *)opaque, bytes, len);
    return n < 0 ? -errno : n;
}

static ptrdiff_t main_write(void *opaque, const void *bytes, size_t len)
{
    ssize_t n = send(*(int *)opaque, bytes, len, MSG_NOSIGNAL);
    return n < 0 ? -errno : n;
}


static _Thread_local struct vfm_error *error; /* each side's own */

#define NEED(call) /* a VMM aborts the migration, and goes on */ \
    (void)((call) == VFM_CODE_OK || (fprintf(stderr, "%s: %s\n", #call, vfm_error_text(error)), _exit(1), 0))

/* ---- the two sides */
static struct vfm_settings *settings;
static struct nic here[DEVICES], there[DEVICES];
static int mains[2], channels[CHANNELS][2];

static void *source(void *unused)
{
    struct vfm_device *devices[DEVICES];
    struct vfm_outgoing *outgoing;
    struct vfm_channel *channel;
    struct vfm_main_writer *writer;
    struct vfm_reply verdict;

    for (uint32_t i = 0; i < DEVICES; i++)
        NEED(vfm_device_new("0000:00:03.0/vfio", i, &nic_ops, &here[i], &devices[i], &error));
    NEED(vfm_outgoing_new(settings, &outgoing, &error));
    for (int i = 0; i < CHANNELS; i++) {
        NEED(vfm_channel_from_fd(channels[i][0], &channel, &error));
        NEED(vfm_outgoing_add_channel(outgoing, channel, &error));
        vfm_channel_free(channel);
    }
    NEED(vfm_outgoing_greet(outgoing, &error));
    NEED(vfm_main_writer_open((struct vfm_output){ main_write, &mains[0] }, &writer, &error));
    for (uint32_t i = 0; i < DEVICES; i++)
        NEED(vfm_outgoing_section(outgoing, writer, VFM_SECTION_KIND_START, i, devices[i], &error));
    NEED(vfm_outgoing_prepare(outgoing, &error));
    /* ... rounds of PART, until vfm_outgoing_pending fits the downtime; then the processors stop ... */
    NEED(vfm_outgoing_stop_vm(outgoing, VFM_REASON_FINISH_MIGRATION, &error));
    NEED(vfm_outgoing_begin(outgoing, &error));
    NEED(vfm_main_writer_command(writer, VFM_COMMAND_SWITCHOVER_START, NULL, 0, &error));
    for (uint32_t kind = VFM_SECTION_KIND_END; kind <= VFM_SECTION_KIND_FULL; kind++)
        for (uint32_t i = 0; i < DEVICES; i++)
            NEED(vfm_outgoing_section(outgoing, writer, kind, i, devices[i], &error));
    NEED(vfm_outgoing_finish(outgoing, &error));
    NEED(vfm_main_writer_eof(writer, &error)); /* from here on the destination may run the VM */
    NEED(vfm_reply_read((struct vfm_input){ main_read, &mains[0] }, &verdict, NULL, 0, &error));
    if (verdict.ended || verdict.kind != VFM_REPLY_SHUT || verdict.value)
        _exit(1); /* a VMM: vfm_outgoing_abort, or where nobody has said, vfm_outgoing_in_doubt */
    NEED(vfm_outgoing_cleanup(outgoing, &error));
    for (int i = 0; i < DEVICES; i++)
        vfm_device_free(devices[i]);
    vfm_main_writer_free(writer);
    vfm_outgoing_free(outgoing);
    return unused;
}

static void destination(void)
{
    struct vfm_device *devices[DEVICES];
    struct vfm_incoming *incoming;
    struct vfm_channel *channel;
    struct vfm_main_reader *reader;
    struct vfm_event event;

    NEED(vfm_incoming_new(settings, &incoming, &error));
    for (uint32_t i = 0; i < DEVICES; i++) {
        NEED(vfm_device_new("0000:00:03.0/vfio", i, &nic_ops, &there[i], &devices[i], &error));
        NEED(vfm_incoming_add_device(incoming, devices[i], &error));
    }
    for (int i = 0; i < CHANNELS; i++) {
        NEED(vfm_channel_from_fd(channels[i][1], &channel, &error));
        NEED(vfm_incoming_add_channel(incoming, channel, &error));
        vfm_channel_free(channel);
    }
    NEED(vfm_incoming_setup(incoming, &error));
    NEED(vfm_main_reader_open((struct vfm_input){ main_read, &mains[1] }, incoming, &reader, &error));
    do {
        NEED(vfm_main_reader_next(reader, &event, &error));
        if (event.kind == VFM_EVENT_CODE_SECTION) /* a VMM looks for its other devices' first */
            NEED(vfm_main_reader_load(reader, incoming, NULL, &error));
        else if (event.kind == VFM_EVENT_CODE_COMMAND && event.command == VFM_COMMAND_SWITCHOVER_START)
            NEED(vfm_incoming_switchover_start(incoming, &error));
    } while (event.kind != VFM_EVENT_CODE_EOF);
    NEED(vfm_incoming_finish(incoming, &error));
    NEED(vfm_incoming_start_vm(incoming, &error)); /* then the processors */
    NEED(vfm_reply_write((struct vfm_output){ main_write, &mains[1] }, VFM_REPLY_SHUT, 0, &error));
    NEED(vfm_incoming_join(incoming, &error));
    vfm_main_reader_free(reader);
    vfm_incoming_free(incoming);
    for (int i = 0; i < DEVICES; i++)
        vfm_device_free(devices[i]);
}

/* loopback [BACKEND]: 1 io_uring, 2 plain calls */
int main(int argc, char **argv)
{
    static unsigned char before[DEVICES][STATE], after[STATE + 1];
    pthread_t thread;
    int failed = socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, mains);
    for (int i = 0; i < CHANNELS; i++)
        failed |= socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channels[i]);
    for (int i = 0; i < DEVICES; i++) {
        for (size_t at = 0; at < STATE; at++)
            before[i][at] = (unsigned char)(at * 31 + at / 4096 + (size_t)i);
        here[i].state = memfd_create("here", MFD_CLOEXEC);
        there[i].state = memfd_create("there", MFD_CLOEXEC);
        memset(here[i].config, 'a' + i, CONFIG);
        failed |= pwrite(here[i].state, before[i], STATE, 0) != STATE;
    }
    NEED(vfm_settings_new(&settings, &error));
    NEED(vfm_settings_set(settings, VFM_SETTING_BACKEND, argc > 1 ? strtoul(argv[1], NULL, 10) : 0, &error));
    if (failed || pthread_create(&thread, NULL, source, NULL))
        return 1;
    destination();
    pthread_join(thread, NULL);
    vfm_settings_free(settings);
    for (int i = 0; i < DEVICES; i++)
        if (pread(there[i].state, after, STATE + 1, 0) != STATE || memcmp(before[i], after, STATE) ||
            memcmp(here[i].config, there[i].config, CONFIG))
            return 1;
    printf("moved %d devices of %d bytes\n", DEVICES, STATE);
    return 0;
}
