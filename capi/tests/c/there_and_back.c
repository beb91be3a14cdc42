/* A device of a VMM in C moves to a destination in Rust, and back into another device here. The device keeps its states
 * itself, as the kernel's do, and has PRE_COPY.
 * there_and_back SOCKET BACKEND: the Rust side listens, and each way connects a main channel and a channel. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <vfio_migration.h>

enum { STATE = 2500000, INITIAL = 100000, CONFIG = 64 };

struct nic {
    unsigned char config[CONFIG];
    int content;
    uint32_t state, events;
};

static int nic_flags(void *nic, uint64_t *flags) { return *flags = VFM_FLAG_STOP_COPY | VFM_FLAG_PRE_COPY, nic ? 0 : -EIO; }
static int nic_state(void *nic, uint32_t *state) { return *state = ((struct nic *)nic)->state, 0; }

#define SAVES(state) ((state) == VFM_STATE_PRE_COPY || (state) == VFM_STATE_STOP_COPY)

static int nic_set_state(void *opaque, uint32_t state, int *data_fd)
{
    struct nic *nic = opaque;
    int begins = state == VFM_STATE_RESUMING || (SAVES(state) && !SAVES(nic->state));
    if (state == VFM_STATE_RESUMING && ftruncate(nic->content, 0))
        return -errno;
    if (begins && (lseek(nic->content, 0, SEEK_SET) < 0 || (*data_fd = fcntl(nic->content, F_DUPFD_CLOEXEC, 0)) < 0))
        return -errno;
    nic->state = state;
    return 0;
}

static int nic_reset(void *nic) { return ((struct nic *)nic)->state = VFM_STATE_RUNNING, 0; }

static int nic_precopy_info(void *opaque, int fd, struct vfm_precopy *info)
{
    off_t at = lseek(fd, 0, SEEK_CUR);
    info->initial_bytes = at < INITIAL ? (uint64_t)(INITIAL - at) : 0;
    return opaque && at >= 0 ? 0 : -EINVAL;
}

static ptrdiff_t nic_read_precopy(void *opaque, int fd, void *bytes, size_t len)
{
    off_t left = INITIAL - lseek(fd, 0, SEEK_CUR);
    if (!opaque || left <= 0)
        return -ENOMSG;
    ssize_t n = read(fd, bytes, len < (size_t)left ? len : (size_t)left);
    return n < 0 ? -errno : n;
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

static void nic_event(void *nic, uint32_t state, bool prepares) { ((struct nic *)nic)->events |= !prepares << state; }

static const struct vfm_device_ops nic_ops = {
    sizeof nic_ops, nic_flags, nic_state, nic_set_state, NULL, NULL, nic_reset, NULL, nic_precopy_info, NULL,
    nic_read_precopy, nic_save_config, nic_load_config, nic_event, NULL,
};

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

static struct vfm_error *error;
static struct vfm_settings *settings;
static struct vfm_channel *channel;
static struct vfm_device *device;
#define NEED(call) \
    (void)((call) == VFM_CODE_OK || (fprintf(stderr, "%s: %s\n", #call, vfm_error_text(error)), _exit(1), 0))

static int connected(const char *path)
{
    struct sockaddr_un to = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    strncpy(to.sun_path, path, sizeof to.sun_path - 1);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to))
        _exit(2);
    return fd;
}

static void with(struct nic *nic, const char *path, void (*way)(int main))
{
    int fd = connected(path);
    NEED(vfm_device_new("nic", 0, &nic_ops, nic, &device, &error));
    NEED(vfm_device_set(device, VFM_DEVICE_SETTING_EVENTS, 1, &error));
    NEED(vfm_channel_from_fd(connected(path), &channel, &error));
    way(fd);
    vfm_channel_free(channel);
    vfm_device_free(device);
    close(fd);
}

static void there(int fd)
{
    struct vfm_outgoing *outgoing;
    struct vfm_main_writer *writer;
    struct vfm_left left;
    struct vfm_reply verdict;
    NEED(vfm_outgoing_new(settings, &outgoing, &error));
    NEED(vfm_outgoing_add_channel(outgoing, channel, &error));
    NEED(vfm_outgoing_greet(outgoing, &error));
    NEED(vfm_main_writer_open((struct vfm_output){ main_write, &fd }, &writer, &error));
    NEED(vfm_outgoing_section(outgoing, writer, VFM_SECTION_KIND_START, 0, device, &error));
    do {
        NEED(vfm_outgoing_section(outgoing, writer, VFM_SECTION_KIND_PART, 0, device, &error));
        NEED(vfm_outgoing_pending(outgoing, NULL, true, &left, &error));
    } while (left.initial);
    NEED(vfm_outgoing_stop_vm(outgoing, VFM_REASON_FINISH_MIGRATION, &error));
    NEED(vfm_outgoing_begin(outgoing, &error));
    NEED(vfm_main_writer_command(writer, VFM_COMMAND_SWITCHOVER_START, NULL, 0, &error));
    NEED(vfm_outgoing_section(outgoing, writer, VFM_SECTION_KIND_END, 0, device, &error));
    NEED(vfm_outgoing_section(outgoing, writer, VFM_SECTION_KIND_FULL, 0, device, &error));
    NEED(vfm_outgoing_finish(outgoing, &error));
    NEED(vfm_main_writer_eof(writer, &error));
    NEED(vfm_reply_read((struct vfm_input){ main_read, &fd }, &verdict, NULL, 0, &error));
    if (verdict.ended || verdict.kind != VFM_REPLY_SHUT || verdict.value)
        _exit(3);
    NEED(vfm_outgoing_cleanup(outgoing, &error));
    vfm_main_writer_free(writer);
    vfm_outgoing_free(outgoing);
}

static void back(int fd)
{
    struct vfm_incoming *incoming;
    struct vfm_main_reader *reader;
    struct vfm_event event;
    NEED(vfm_incoming_new(settings, &incoming, &error));
    NEED(vfm_incoming_add_channel(incoming, channel, &error));
    NEED(vfm_incoming_add_device(incoming, device, &error));
    NEED(vfm_incoming_setup(incoming, &error));
    NEED(vfm_main_reader_open((struct vfm_input){ main_read, &fd }, incoming, &reader, &error));
    do {
        NEED(vfm_main_reader_next(reader, &event, &error));
        if (event.kind == VFM_EVENT_CODE_SECTION)
            NEED(vfm_main_reader_load(reader, incoming, NULL, &error));
        else if (event.kind == VFM_EVENT_CODE_COMMAND && event.command == VFM_COMMAND_SWITCHOVER_START)
            NEED(vfm_incoming_switchover_start(incoming, &error));
    } while (event.kind != VFM_EVENT_CODE_EOF);
    NEED(vfm_incoming_finish(incoming, &error));
    NEED(vfm_incoming_start_vm(incoming, &error));
    NEED(vfm_reply_write((struct vfm_output){ main_write, &fd }, VFM_REPLY_SHUT, 0, &error));
    NEED(vfm_incoming_join(incoming, &error));
    vfm_main_reader_free(reader);
    vfm_incoming_free(incoming);
}

int main(int argc, char **argv)
{
    static unsigned char content[STATE], after[STATE + 1];
    struct nic first = { .state = VFM_STATE_RUNNING }, second = { .state = VFM_STATE_RUNNING };
    first.content = memfd_create("first", MFD_CLOEXEC);
    second.content = memfd_create("second", MFD_CLOEXEC);
    for (size_t at = 0; at < STATE; at++)
        content[at] = (unsigned char)(at * 31 + at / 4096);
    memset(first.config, 'c', CONFIG);
    if (argc < 3 || pwrite(first.content, content, STATE, 0) != STATE)
        return 4;
    NEED(vfm_settings_new(&settings, &error));
    NEED(vfm_settings_set(settings, VFM_SETTING_BACKEND, strtoul(argv[2], NULL, 10), &error));
    with(&first, argv[1], there);
    with(&second, argv[1], back);
    vfm_settings_free(settings);
    if (first.state != VFM_STATE_STOP || second.state != VFM_STATE_RUNNING || !(first.events & 1 << VFM_STATE_PRE_COPY))
        return 5;
    return pread(second.content, after, STATE + 1, 0) != STATE || memcmp(content, after, STATE) ||
           memcmp(first.config, second.config, CONFIG);
}
