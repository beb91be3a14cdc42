/* Wrong calls, wrong callbacks, wrong threads: each is an error with its text, and what was handed over is released.
 * misuse BACKEND: 0, or 2 for plain calls. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <vfio_migration.h>

#define CHECK(condition) \
    do { \
        if (!(condition)) { \
            fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
            _exit(1); \
        } \
    } while (0)

static void is(enum vfm_code got, enum vfm_code wanted, struct vfm_error *error, const char *text, int line)
{
    const char *says = vfm_error_text(error);
    if (got != wanted || vfm_error_code(error) != wanted || !strstr(says, text)) {
        fprintf(stderr, "line %d: %d instead of %d: %s\n", line, got, wanted, says);
        _exit(1);
    }
    vfm_error_free(error);
}
static _Thread_local struct vfm_error *error;
#define FAILS(call, code, text) \
    do { \
        enum vfm_code got = call; \
        is(got, VFM_CODE_##code, error, text, __LINE__); \
    } while (0)
#define OK(call) FAILS(call, OK, "")
#define MISUSE(call, text) FAILS(call, MISUSE, text)

static struct vfm_settings *settings;
static uint64_t backend;
static atomic_int released;

static int open_fd(void *opaque, uint32_t state, int *fd)
{
    (void)opaque;
    (void)state;
    *fd = memfd_create("state", MFD_CLOEXEC);
    return *fd < 0 ? -errno : 0;
}

static void release(void *opaque)
{
    (void)opaque;
    released++;
}

static int refuses(void *opaque, uint32_t state, int *fd)
{
    (void)opaque;
    (void)state;
    (void)fd;
    return -EIO;
}

static int positive(void *opaque, uint32_t from, uint32_t to)
{
    (void)opaque;
    (void)from;
    (void)to;
    return 7; /* callbacks say 0 or a negative errno */
}

static ptrdiff_t too_much(void *opaque, void *bytes, size_t len)
{
    (void)opaque;
    memset(bytes, 0, len);
    return (ptrdiff_t)len + 1;
}

static ptrdiff_t broken(void *opaque, const void *bytes, size_t len)
{
    (void)opaque;
    (void)bytes;
    (void)len;
    return -ECONNRESET;
}

static struct vfm_device *device(const char *name)
{
    struct vfm_device_ops ops = { .size = sizeof ops, .open = open_fd, .release = release };
    struct vfm_device *made;
    OK(vfm_device_new(name, 0, &ops, NULL, &made, &error));
    return made;
}

static void devices(void)
{
    struct vfm_device_ops ops = { .size = sizeof ops, .open = open_fd, .release = release };
    struct vfm_device *made = NULL;
    struct vfm_status status;
    released = 0;
    MISUSE(vfm_device_new("", 0, &ops, NULL, &made, &error), "idstr");
    MISUSE(vfm_device_new("\xff\xfe", 0, &ops, NULL, &made, &error), "UTF-8");
    MISUSE(vfm_device_new("a", 0, &ops, NULL, NULL, &error), "device: NULL");
    ops.size = 8;
    MISUSE(vfm_device_new("a", 0, &ops, NULL, &made, &error), "size");
    ops.size = sizeof ops;
    ops.set_state = refuses;
    MISUSE(vfm_device_new("a", 0, &ops, NULL, &made, &error), "one of set_state and open");
    ops.open = NULL;
    MISUSE(vfm_device_new("a", 0, &ops, NULL, &made, &error), "set_state comes with");
    MISUSE(vfm_device_from_vfio("a", 0, -1, &ops, NULL, &made, &error), "not open");
    CHECK(released == 7 && !made);
    FAILS(vfm_device_from_vfio("a", 0, 0, NULL, NULL, &made, &error), DEVICE, "a");

    made = device("a");
    OK(vfm_device_status(made, &status, &error));
    CHECK(status.state == VFM_STATE_RUNNING && status.flags == VFM_FLAG_STOP_COPY && !status.was_reset);
    MISUSE(vfm_device_set(made, 99, 0, &error), "no such setting");
    MISUSE(vfm_device_set(made, VFM_DEVICE_SETTING_EVENTS, 2, &error), "0 or 1");
    MISUSE(vfm_device_set(made, VFM_DEVICE_SETTING_TRANSFER, 3, &error), "AUTO");
    MISUSE(vfm_device_set_state(made, 99, VFM_STATE_STOP, &error), "state");
    FAILS(vfm_device_set_state(made, VFM_STATE_PRE_COPY, VFM_STATE_RUNNING, &error), STATE, "PRE_COPY");
    OK(vfm_device_set_state(made, VFM_STATE_STOP, VFM_STATE_ERROR, &error));
    OK(vfm_device_reset(made, &error));
    vfm_device_free(made);

    ops = (struct vfm_device_ops){ .size = sizeof ops, .open = refuses, .change = positive, .release = release };
    OK(vfm_device_new("a", 0, &ops, NULL, &made, &error));
    enum vfm_code code = vfm_device_set_state(made, VFM_STATE_STOP, VFM_STATE_RUNNING, &error);
    uint32_t from, to, instance;
    CHECK(vfm_error_errno(error) == EPROTO && vfm_error_states(error, &from, &to));
    CHECK(from == VFM_STATE_RUNNING && to == VFM_STATE_STOP && vfm_error_channel(error) == -1);
    CHECK(!strcmp(vfm_error_device(error, &instance), "a") && !strcmp(vfm_error_phase(error), "state"));
    is(code, VFM_CODE_STATE, error, "refused the state", __LINE__);
    vfm_device_free(made);
    CHECK(released == 9);
}

static void sets(void)
{
    uint64_t bound;
    MISUSE(vfm_settings_set(settings, 99, 0, &error), "no such setting");
    MISUSE(vfm_settings_set(settings, VFM_SETTING_BACKEND, 3, &error), "0 to 2");
    MISUSE(vfm_settings_set(settings, VFM_SETTING_WINDOW, 1ull << 40, &error), "too large");
    OK(vfm_settings_set(settings, VFM_SETTING_WINDOW, 0, &error));
    MISUSE(vfm_settings_check(settings, &error), "window");
    OK(vfm_settings_set(settings, VFM_SETTING_WINDOW, 65536, &error));
    OK(vfm_settings_check(settings, &error));
    OK(vfm_settings_memory_bound(settings, 2, 2, &bound, &error));
    CHECK(bound > 32 << 20);
    struct vfm_error *made;
    MISUSE(vfm_error_new(VFM_CODE_OK, "fine", &made, &error), "code");
}

static void *publishes_elsewhere(void *publisher)
{
    MISUSE(vfm_publisher_push(publisher, "a", 0, "000000000000", 12, &error), "another thread");
    return NULL;
}

static void *joins(void *load)
{
    FAILS(vfm_load_join(load, &error), CANCELLED, "cancelled");
    return NULL;
}

static void loads(void)
{
    struct vfm_load *load;
    struct vfm_publisher *publisher;
    struct vfm_canceller *canceller;
    struct vfm_stats *stats;
    struct vfm_device *a = device("a");
    struct vfm_status status;
    void *data;
    bool pushed;
    pthread_t thread;

    OK(vfm_load_new(settings, &load, &error));
    MISUSE(vfm_load_switchover_start(load, &error), "not been started");
    MISUSE(vfm_load_join(load, &error), "not been started");
    OK(vfm_load_add_device(load, a, &error));
    MISUSE(vfm_load_add_device(load, a, &error), "a migration has it");
    MISUSE(vfm_device_status(a, &status, &error), "a migration has it");
    OK(vfm_load_start(load, &error));
    MISUSE(vfm_load_start(load, &error), "has been started");
    CHECK(vfm_load_eventfd(load) >= 0 && !vfm_load_is_finished(load));
    OK(vfm_load_publisher(load, &publisher, &error));
    CHECK(!pthread_create(&thread, NULL, publishes_elsewhere, publisher) && !pthread_join(thread, NULL));
    MISUSE(vfm_publisher_publish(publisher, &error), "nothing is leased");
    OK(vfm_load_no_more_channels(load, &error));
    OK(vfm_load_switchover_start(load, &error));
    OK(vfm_publisher_lease(publisher, "a", 0, 1, false, 5, true, &data, &error));
    CHECK(data);
    MISUSE(vfm_publisher_push(publisher, "a", 0, "000000000000", 12, &error), "neither published nor given back");
    OK(vfm_publisher_release(publisher, &error));
    OK(vfm_publisher_lease(publisher, "a", 0, 0, false, 5, false, &data, &error));
    memcpy(data, "state", 5);
    OK(vfm_publisher_publish(publisher, &error));
    OK(vfm_publisher_try_push(publisher, "a", 0, "\0\0\0\0\0\0\0\1\0\0\0\0data", 16, &pushed, &error));
    CHECK(pushed);
    OK(vfm_load_failure(load, &error));
    FAILS(vfm_publisher_push(publisher, "b", 0, "\0\0\0\0\0\0\0\1\0\0\0\0data", 16, &error), PROTOCOL, "no device");
    CHECK(vfm_load_failure(load, &error) == VFM_CODE_PROTOCOL);
    is(VFM_CODE_PROTOCOL, VFM_CODE_PROTOCOL, error, "no device", __LINE__);
    vfm_publisher_free(publisher);
    FAILS(vfm_load_join(load, &error), PROTOCOL, "no device");
    MISUSE(vfm_load_join(load, &error), "over");
    OK(vfm_load_stats(load, &stats, &error));
    CHECK(vfm_stats_devices(stats) == 1 && !strcmp(vfm_stats_device_name(stats, 0, NULL), "a"));
    CHECK(vfm_stats_get(stats, VFM_COUNTER_BUDGET) && !vfm_stats_get(stats, 99) && !vfm_stats_device(stats, 1, 0));
    vfm_stats_free(stats);
    vfm_load_free(load);
    OK(vfm_device_status(a, &status, &error));
    CHECK(status.state == VFM_STATE_RUNNING && status.was_reset);

    /* one that another thread waits in is cancelled from this one, and freed handles do not matter to it */
    OK(vfm_load_new(settings, &load, &error));
    OK(vfm_load_add_device(load, a, &error));
    vfm_device_free(a);
    OK(vfm_load_canceller(load, &canceller, &error));
    OK(vfm_load_start(load, &error));
    released = 0;
    CHECK(!pthread_create(&thread, NULL, joins, load));
    usleep(20000);
    vfm_canceller_cancel(canceller);
    CHECK(!pthread_join(thread, NULL));
    CHECK(released == 1);
    vfm_load_free(load);
    vfm_canceller_cancel(canceller); /* too late: nothing */
    vfm_canceller_free(canceller);

    /* one that is freed while it runs */
    a = device("a");
    OK(vfm_load_new(settings, &load, &error));
    OK(vfm_load_add_device(load, a, &error));
    OK(vfm_load_start(load, &error));
    vfm_load_free(load);
    OK(vfm_device_status(a, &status, &error));
    vfm_device_free(a);
}

static void *runs(void *task)
{
    vfm_task_run(task);
    return NULL;
}

static atomic_int spawned, refuse;

static int spawn(void *opaque, struct vfm_task *task)
{
    pthread_t thread;
    (void)opaque;
    CHECK(strlen(vfm_task_name(task)) <= 15 && vfm_task_kind(task) <= VFM_TASK_KIND_OTHER);
    if (refuse)
        return -EAGAIN;
    spawned++;
    int failed = pthread_create(&thread, NULL, runs, task);
    return failed ? -failed : -pthread_detach(thread);
}

static void threads(void)
{
    struct vfm_settings *own;
    struct vfm_device *a = device("a");
    OK(vfm_settings_new(&own, &error));
    OK(vfm_settings_set(own, VFM_SETTING_BACKEND, backend, &error));
    released = 0;
    OK(vfm_settings_spawn_with(own, spawn, NULL, release, &error));
    for (refuse = 0; refuse < 2; refuse++) {
        struct vfm_load *load;
        OK(vfm_load_new(own, &load, &error));
        OK(vfm_load_add_device(load, a, &error));
        if (refuse)
            FAILS(vfm_load_start(load, &error), HOST, "");
        else
            OK(vfm_load_start(load, &error));
        vfm_load_free(load);
        CHECK(spawned == 2);
    }
    vfm_settings_free(own);
    vfm_device_free(a);
    while (released < 2) /* the last thread may still hold the spawner */
        usleep(1000);
}

static void saves_and_migrations(void)
{
    struct vfm_output nowhere = { broken, NULL };
    struct vfm_input wrong = { too_much, NULL };
    struct vfm_outgoing *outgoing;
    struct vfm_incoming *incoming;
    struct vfm_main_writer *writer;
    struct vfm_main_reader *reader;
    struct vfm_canceller *canceller;
    struct vfm_channel *channel;
    struct vfm_error *reason;
    struct vfm_reply reply;
    struct vfm_save *save;
    struct vfm_status status;
    struct vfm_device *a = device("a");
    int pair[2];

    CHECK(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
    MISUSE(vfm_channel_from_fd(-1, &channel, &error), "not open");
    MISUSE(vfm_channel_from_fd(9999, &channel, &error), "not open");
    OK(vfm_save_new(settings, &save, &error));
    OK(vfm_save_add_device(save, a, &error));
    MISUSE(vfm_save_start(save, &error), "channels"); /* and it is over */
    MISUSE(vfm_save_join(save, &error), "not running");
    MISUSE(vfm_save_stop_devices(save, &error), "joined");
    vfm_save_free(save);

    OK(vfm_outgoing_new(settings, &outgoing, &error));
    OK(vfm_channel_from_fd(pair[0], &channel, &error));
    MISUSE(vfm_channel_set_page_size(channel, 3, &error), "page");
    OK(vfm_outgoing_add_channel(outgoing, channel, &error));
    MISUSE(vfm_outgoing_add_channel(outgoing, channel, &error), "given away");
    vfm_channel_free(channel);
    OK(vfm_outgoing_greet(outgoing, &error));
    MISUSE(vfm_outgoing_greet(outgoing, &error), "greeted");
    FAILS(vfm_main_writer_open(nowhere, &writer, &error), CHANNEL, "reset");
    FAILS(vfm_outgoing_setup_device(outgoing, a, nowhere, &error), CHANNEL, "reset");
    OK(vfm_device_status(a, &status, &error)); /* it is back */
    MISUSE(vfm_outgoing_setup_device(outgoing, a, (struct vfm_output){ NULL, NULL }, &error), "write is NULL");
    MISUSE(vfm_outgoing_iterate(outgoing, a, nowhere, NULL, &error), "not been set up");
    MISUSE(vfm_outgoing_write_state(outgoing, a, nowhere, &error), "turn");
    MISUSE(vfm_outgoing_finish(outgoing, &error), "turn");
    MISUSE(vfm_outgoing_cleanup(outgoing, &error), "turn");
    MISUSE(vfm_outgoing_stop_vm(outgoing, 9, &error), "reason");
    OK(vfm_outgoing_canceller(outgoing, &canceller, &error));
    OK(vfm_error_new(VFM_CODE_CHANNEL, "the cable", &reason, &error));
    OK(vfm_canceller_fail(canceller, reason, &error));
    FAILS(vfm_outgoing_prepare(outgoing, &error), CHANNEL, "the cable");
    FAILS(vfm_outgoing_begin(outgoing, &error), CHANNEL, "the cable");
    FAILS(vfm_outgoing_failure(outgoing, &error), CHANNEL, "the cable");
    OK(vfm_outgoing_abort(outgoing, &error));
    vfm_canceller_free(canceller);
    vfm_outgoing_free(outgoing);

    OK(vfm_incoming_new(settings, &incoming, &error));
    MISUSE(vfm_incoming_finish(incoming, &error), "turn");
    MISUSE(vfm_incoming_start_vm(incoming, &error), "turn");
    MISUSE(vfm_incoming_setup(incoming, &error), "has a device"); /* and it is over */
    vfm_incoming_free(incoming);
    OK(vfm_incoming_new(settings, &incoming, &error));
    OK(vfm_incoming_add_device(incoming, a, &error));
    OK(vfm_incoming_setup(incoming, &error));
    FAILS(vfm_incoming_load_state(incoming, "b", 0, wrong, NULL, &error), PROTOCOL, "no device");
    FAILS(vfm_incoming_load_state(incoming, "a", 0, wrong, NULL, &error), CHANNEL, "Protocol error");
    OK(vfm_incoming_fail(incoming, reason, &error));
    FAILS(vfm_incoming_finish(incoming, &error), CHANNEL, "Protocol error"); /* the first reason */
    vfm_incoming_free(incoming);
    FAILS(vfm_main_reader_open(wrong, NULL, &reader, &error), CHANNEL, "Protocol error");
    FAILS(vfm_reply_read(wrong, &reply, NULL, 0, &error), CHANNEL, "Protocol error");
    MISUSE(vfm_reply_write(nowhere, 99, 0, &error), "no reply");
    vfm_error_free(reason);
    close(pair[1]);
    vfm_device_free(a);
}

static int blocked(void *opaque, const char *idstr, uint32_t instance, uint32_t refusal)
{
    *(uint32_t *)opaque = refusal;
    return strcmp(idstr, "a") || instance ? -EINVAL : 0;
}

static void blockers(void)
{
    struct vfm_device_ops ops = { .size = sizeof ops, .open = open_fd, .release = release };
    struct vfm_blockers *list;
    struct vfm_device *made = NULL;
    uint32_t why = 0;
    bool there;
    OK(vfm_blockers_new(&list, &error));
    released = 0;
    FAILS(vfm_blockers_admit(list, "a", 0, &ops, NULL, VFM_PLATFORM_VIOMMU, VFM_SWITCH_ON, blocked, &why, &made, &error),
          UNMIGRATABLE, "vIOMMU");
    OK(vfm_blockers_admit(list, "a", 0, &ops, NULL, 0, VFM_SWITCH_AUTO, blocked, &why, &made, &error));
    CHECK(!made && why == VFM_REFUSAL_NO_DIRTY_TRACKING && released == 2);
    CHECK(vfm_blockers_count(list) == 1 && vfm_blockers_refusal(list, "a", 0) == VFM_REFUSAL_NO_DIRTY_TRACKING);
    OK(vfm_blockers_remove(list, "a", 0, &there, &error));
    CHECK(there && vfm_blockers_count(list) == 0);
    OK(vfm_blockers_admit(list, "a", 0, &ops, NULL, VFM_PLATFORM_DEVICE_DIRTY_TRACKING, VFM_SWITCH_AUTO, blocked, &why,
                          &made, &error));
    CHECK(made);
    vfm_device_free(made);
    vfm_blockers_free(list);
}

int main(int argc, char **argv)
{
    OK(vfm_settings_new(&settings, &error));
    backend = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
    OK(vfm_settings_set(settings, VFM_SETTING_BACKEND, backend, &error));
    devices();
    sets();
    loads();
    threads();
    saves_and_migrations();
    blockers();
    vfm_settings_free(settings);
    return 0;
}
