//! The system calls that the engine makes, by thread and backend: the code form of the table in
//! `docs/security.md`, for a VMM's filters.
//!
//! The lists are the engine's and its standard library's alone. What a callback, a sink, a hook or a stream of the
//! VMM's calls comes on top. They were found by running the engine, as `engine/tests/meta/security.rs` does under
//! filters made from them: x86-64 with glibc. On aarch64 a few calls do not exist; the one that stands for each is
//! listed there.

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use std::sync::LazyLock;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use nix::libc::{self, c_long};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use vfio_migration_uring::Backend;

/// What a thread does for the engine, as far as a filter is concerned. [`TaskKind::role`](crate::TaskKind::role)
/// says it of a task.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[non_exhaustive]
pub enum Role {
    /// Builds, starts, cancels and joins sessions, greets a source's channels, or makes the calls of
    /// [`migration`](crate::migration): a thread of the VMM's. The lists say what it needs itself, where
    /// `spawn_with` gives the tasks to threads that it has not made.
    Setup,
    /// As [`Role::Setup`], where the tasks' threads are made by it: a thread inherits the filters of its maker,
    /// so this is everything of all roles.
    SetupWithThreads,
    /// [`TaskKind::Io`](crate::TaskKind::Io). With [`Backend::Blocking`] it makes workers, so the list has
    /// theirs too.
    Io,
    /// [`TaskKind::Worker`](crate::TaskKind::Worker).
    Worker,
    /// [`TaskKind::Channel`](crate::TaskKind::Channel).
    Channel,
    /// [`TaskKind::Device`](crate::TaskKind::Device) and [`TaskKind::State`](crate::TaskKind::State).
    Device,
    /// [`TaskKind::Precopy`](crate::TaskKind::Precopy).
    Precopy,
    /// [`TaskKind::Close`](crate::TaskKind::Close).
    Close,
}

impl Role {
    /// All there are.
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    const ALL: [Self; 8] = [
        Self::Setup,
        Self::SetupWithThreads,
        Self::Io,
        Self::Worker,
        Self::Channel,
        Self::Device,
        Self::Precopy,
        Self::Close,
    ];
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
type Calls = &'static [(&'static str, c_long)];

/// Calls by the names that `libc` gives them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! calls {
    ($($name:ident)*) => { &[$((stringify!($name), libc::$name)),*] };
}

/// As every thread needs them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const EVERY: Calls = calls! {
    SYS_futex SYS_mmap SYS_munmap SYS_mremap SYS_mprotect SYS_madvise SYS_brk SYS_close SYS_fcntl SYS_gettid
    SYS_sched_yield SYS_sched_getaffinity SYS_sigaltstack SYS_rt_sigprocmask SYS_exit SYS_write
    SYS_clock_nanosleep SYS_restart_syscall
};

/// A file's kind. Which of the two is made depends on the version of glibc.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const STAT: Calls = calls! { SYS_newfstatat SYS_fstat };

#[cfg(target_arch = "x86_64")]
const POLL: Calls = calls! { SYS_poll };
#[cfg(target_arch = "aarch64")]
const POLL: Calls = calls! { SYS_ppoll };

/// A thread, made; and the first of what it does.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const MAKE_THREAD: Calls = calls! { SYS_clone3 SYS_set_robust_list SYS_rseq SYS_prctl };

/// What a role needs beside [`EVERY`].
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn own(role: Role, blocking: bool) -> Vec<Calls> {
    let kernel = |calls: Calls| if blocking { &[] } else { calls };
    match role {
        Role::Setup => vec![
            calls! { SYS_eventfd2 SYS_memfd_create },
            kernel(calls! { SYS_io_uring_setup SYS_io_uring_register SYS_io_uring_enter }),
            calls! { SYS_ioctl SYS_setsockopt SYS_writev SYS_recvfrom SYS_shutdown },
            POLL,
            MAKE_THREAD,
            calls! { SYS_prlimit64 SYS_openat SYS_statx SYS_lseek SYS_read },
        ],
        Role::Io if blocking => {
            let mut calls = own(Role::Worker, blocking);
            calls.extend([
                calls! { SYS_read SYS_lseek SYS_eventfd2 SYS_shutdown },
                MAKE_THREAD,
            ]);
            calls
        }
        Role::Io => vec![calls! { SYS_io_uring_enter SYS_lseek SYS_shutdown }, STAT],
        Role::Worker if blocking => vec![
            calls! { SYS_ppoll SYS_read SYS_pread64 SYS_pwrite64 SYS_preadv2 SYS_pwritev2 },
            STAT,
        ],
        // There is none.
        Role::Worker => vec![],
        Role::Channel => vec![
            calls! { SYS_setsockopt SYS_recvfrom SYS_readv SYS_writev SYS_pwrite64 SYS_getrusage SYS_shutdown },
            POLL,
        ],
        Role::Device => vec![calls! { SYS_shutdown }, STAT],
        // The VMM's RAM and devices beside it are its own.
        Role::Precopy => vec![
            calls! { SYS_setsockopt SYS_writev SYS_read SYS_shutdown },
            POLL,
            STAT,
        ],
        Role::Close => vec![calls! { SYS_shutdown }],
        Role::SetupWithThreads => {
            let others = Role::ALL
                .into_iter()
                .filter(|role| *role != Role::SetupWithThreads);
            others.flat_map(|role| own(role, blocking)).collect()
        }
    }
}

/// The lists, by role and backend: Auto, Uring, Blocking.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
type Table = [[Vec<(&'static str, c_long)>; 3]; Role::ALL.len()];

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
static TABLE: LazyLock<Table> = LazyLock::new(|| {
    Role::ALL.map(|role| {
        [&[false, true][..], &[false], &[true]].map(|backends| {
            let own = backends.iter().flat_map(|blocking| own(role, *blocking));
            let mut list: Vec<(&str, c_long)> = Vec::new();
            for (name, number) in std::iter::once(EVERY).chain(own).flatten() {
                if !list.iter().any(|(_, other)| other == number) {
                    list.push((name.trim_start_matches("SYS_"), *number));
                }
            }
            list
        })
    })
});

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
static NUMBERS: LazyLock<Vec<Vec<Vec<c_long>>>> = LazyLock::new(|| {
    let numbers = |list: &Vec<(&str, c_long)>| list.iter().map(|(_, number)| *number).collect();
    let rows = TABLE.iter();
    rows.map(|lists| lists.iter().map(numbers).collect())
        .collect()
});

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn at(role: Role, backend: Backend) -> (usize, usize) {
    let role = Role::ALL.iter().position(|other| *other == role);
    let backend = match backend {
        Backend::Auto => 0,
        Backend::Uring => 1,
        Backend::Blocking => 2,
    };
    (role.expect("each role is in the table"), backend)
}

/// Returns the numbers of the system calls that a thread may make for the engine: for a seccomp filter, on x86-64
/// and aarch64. With [`Backend::Auto`] these are the calls of both backends.
///
/// - **What comes on top** is the VMM's own: what its callbacks, sinks, streams and hooks call. A device's thread
///   makes the ioctls of the VMM's [`MigrationDevice`](crate::MigrationDevice), for example.
/// - **Filters stack.** A new thread has all filters of the thread that made it, and a call needs the leave of each.
///   If a thread with a filter starts a session and the engine makes the threads, that filter must allow
///   [`Role::SetupWithThreads`]; and `seccomp` and `prctl`, if
///   [`on_thread_start`](crate::LoadBuilder::on_thread_start) is to install a narrower one. So must the I/O
///   thread's, with [`Backend::Blocking`]. Or `spawn_with` gives
///   the tasks to threads that somebody else has made; then [`Role::Setup`] is enough.
/// - **A filter that kills leaves nothing to fall back to.** [`Backend::Auto`] finds out that io_uring is forbidden
///   by an errno. A filter that ends the thread or the process gives none: allow `io_uring_setup`, have the filter
///   return `EPERM` for it, or choose [`Backend::Blocking`].
///
/// ```
/// use vfio_migration::{Backend, Role, TaskKind, system_calls};
///
/// let io = system_calls(TaskKind::Io.role(), Backend::Uring);
/// assert!(!io.is_empty());
/// // What the narrowest thread may do, the thread that makes all of them may do.
/// let setup = system_calls(Role::SetupWithThreads, Backend::Uring);
/// assert!(io.iter().all(|call| setup.contains(call)));
/// ```
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[must_use]
pub fn system_calls(role: Role, backend: Backend) -> &'static [c_long] {
    let (role, backend) = at(role, backend);
    &NUMBERS[role][backend]
}

/// Returns the names of the calls of [`system_calls`], in the same order: for filters that are written by name.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[must_use]
pub fn system_call_names(role: Role, backend: Backend) -> Vec<&'static str> {
    let (role, backend) = at(role, backend);
    TABLE[role][backend].iter().map(|(name, _)| *name).collect()
}
