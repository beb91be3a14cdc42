//! The k-th system call of the engine's threads fails, on the kernel's ring and on the blocking one.
//!
//! A seccomp filter on the thread that runs the sessions, which their threads inherit, sends one
//! kind of call to a supervisor (`SECCOMP_RET_USER_NOTIF`): it counts them, lets them go on, and
//! answers the k-th with an errno. So nothing in the engine knows of it, and what fails is what fails
//! on a host: a ring or its memory that cannot be had, an eventfd, a thread, a wait, a socket's call.
//!
//! The simulated devices' own threads are let through. Calls whose failure Rust's runtime does not
//! survive by design (memory for the heap, futexes, signal masks) are not in the table.
#![expect(unsafe_code, reason = "seccomp has no safe interface")]

use std::{
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::mpsc,
    thread,
};

use vfio_migration::{
    Backend,
    sim::{SimConfig, Stream},
};

use crate::{
    kth::Kth,
    run::{Expect, Scene, judged, name},
    tally::{Sweep, numbers},
};

/// A kind of call, and how it fails.
struct Call {
    name: &'static str,
    number: i64,
    backend: Backend,
    /// Threads whose calls count, by the beginning of their names. None: all but the devices' own.
    threads: Option<&'static str>,
    errnos: &'static [(i32, Expect)],
}

use Expect::{Any, Cause, Success};
use libc::{
    EAGAIN, EBUSY, ECONNRESET, EINTR, EINVAL, EIO, EMFILE, ENFILE, ENOMEM, ENOSYS, ENOTCONN, EPERM,
    EPIPE,
};

const AUTO: Backend = Backend::Auto;
const BLOCKING: Backend = Backend::Blocking;

const CALLS: &[Call] = &[
    // What keeps a ring from being had leads to the other backend; but a process that is out of
    // file descriptors hears of it.
    Call {
        name: "io_uring_setup",
        number: libc::SYS_io_uring_setup,
        backend: AUTO,
        threads: None,
        errnos: &[
            (ENOSYS, Success),
            (EPERM, Success),
            (ENOMEM, Success),
            (EINVAL, Success),
            (EMFILE, Cause(EMFILE)),
            (ENFILE, Cause(ENFILE)),
        ],
    },
    Call {
        name: "mmap of the ring",
        number: libc::SYS_mmap,
        backend: AUTO,
        threads: None,
        errnos: &[(ENOMEM, Success), (EPERM, Success), (EAGAIN, Cause(EAGAIN))],
    },
    Call {
        name: "io_uring_register",
        number: libc::SYS_io_uring_register,
        backend: AUTO,
        threads: None,
        // 0: it says that it was done, and was not.
        errnos: &[
            (EINVAL, Success),
            (ENOMEM, Success),
            (EPERM, Success),
            (0, Any),
        ],
    },
    // One wait that fails for want of memory is tried again.
    Call {
        name: "io_uring_enter",
        number: libc::SYS_io_uring_enter,
        backend: AUTO,
        threads: None,
        errnos: &[
            (EINTR, Success),
            (EAGAIN, Success),
            (EBUSY, Success),
            (ENOMEM, Success),
            (EIO, Cause(EIO)),
            (EPERM, Cause(EPERM)),
        ],
    },
    Call {
        name: "eventfd2",
        number: libc::SYS_eventfd2,
        backend: AUTO,
        threads: None,
        errnos: &[(EMFILE, Cause(EMFILE)), (ENOMEM, Cause(ENOMEM))],
    },
    Call {
        name: "clone3",
        number: libc::SYS_clone3,
        backend: AUTO,
        threads: None,
        errnos: &[(EAGAIN, Cause(EAGAIN)), (ENOMEM, Any)],
    },
    Call {
        name: "clone3 (blocking)",
        number: libc::SYS_clone3,
        backend: BLOCKING,
        threads: None,
        errnos: &[(EAGAIN, Cause(EAGAIN))],
    },
    Call {
        name: "fcntl",
        number: libc::SYS_fcntl,
        backend: AUTO,
        threads: None,
        errnos: &[(EMFILE, Any), (ENOMEM, Any)],
    },
    Call {
        name: "setsockopt",
        number: libc::SYS_setsockopt,
        backend: AUTO,
        threads: None,
        errnos: &[(ENOMEM, Cause(ENOMEM)), (EINVAL, Cause(EINVAL))],
    },
    Call {
        name: "shutdown",
        number: libc::SYS_shutdown,
        backend: AUTO,
        threads: None,
        errnos: &[(ENOTCONN, Any), (EIO, Any)],
    },
    Call {
        name: "poll of a channel",
        number: libc::SYS_poll,
        backend: AUTO,
        threads: Some("vfio-mig-ch"),
        errnos: &[(EINTR, Success), (ENOMEM, Success)],
    },
    Call {
        name: "recvfrom",
        number: libc::SYS_recvfrom,
        backend: AUTO,
        threads: Some("vfio-mig-ch"),
        errnos: &[
            (EINTR, Success),
            (ENOMEM, Cause(ENOMEM)),
            (ECONNRESET, Cause(ECONNRESET)),
        ],
    },
    Call {
        name: "readv",
        number: libc::SYS_readv,
        backend: AUTO,
        threads: Some("vfio-mig-ch"),
        errnos: &[
            (EINTR, Success),
            (ENOMEM, Cause(ENOMEM)),
            (ECONNRESET, Cause(ECONNRESET)),
        ],
    },
    Call {
        name: "writev",
        number: libc::SYS_writev,
        backend: AUTO,
        threads: Some("vfio-mig-ch"),
        errnos: &[
            (EINTR, Success),
            (ENOMEM, Cause(ENOMEM)),
            (EPIPE, Cause(EPIPE)),
        ],
    },
    Call {
        name: "pwrite64 of a channel",
        number: libc::SYS_pwrite64,
        backend: AUTO,
        threads: Some("vfio-mig-ch"),
        errnos: &[(EINTR, Success), (EAGAIN, Success), (EIO, Cause(EIO))],
    },
    Call {
        name: "ppoll (blocking)",
        number: libc::SYS_ppoll,
        backend: BLOCKING,
        threads: None,
        errnos: &[(EINTR, Success), (ENOMEM, Any), (EINVAL, Any)],
    },
    Call {
        name: "preadv2 (blocking)",
        number: libc::SYS_preadv2,
        backend: BLOCKING,
        threads: Some("uring-"),
        errnos: &[(EINTR, Success), (EAGAIN, Success), (EIO, Cause(EIO))],
    },
    Call {
        name: "pwritev2 (blocking)",
        number: libc::SYS_pwritev2,
        backend: BLOCKING,
        threads: Some("uring-"),
        errnos: &[(EINTR, Success), (EAGAIN, Success), (EIO, Cause(EIO))],
    },
];

/// Runs a body whose threads' calls of one kind are counted, and one of them refused.
#[derive(Clone)]
pub struct Supervisor {
    number: i64,
    threads: Option<&'static str>,
    kth: Kth<i32>,
}

impl Supervisor {
    /// Runs `body` on a thread of its own, under the filter, and ends when its threads have.
    pub fn run<R: Send>(&self, body: impl FnOnce() -> R + Send) -> R {
        let (sender, listener) = mpsc::channel();
        thread::scope(|scope| {
            let supervised = scope.spawn(|| {
                sender.send(listen(self.number).unwrap()).unwrap();
                body()
            });
            self.serve(&listener.recv().unwrap());
            supervised.join().unwrap()
        })
    }

    /// Answers until no filtered thread is left.
    fn serve(&self, listener: &OwnedFd) {
        loop {
            let mut entry = libc::pollfd {
                fd: listener.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one entry, borrowed for the call.
            let ready = unsafe { libc::poll(&raw mut entry, 1, -1) };
            if ready < 0 {
                continue;
            }
            if entry.revents & libc::POLLIN == 0 {
                return;
            }
            // SAFETY: plain numbers, for which zero is a value.
            let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the kernel fills `call`, which is zeroed as it demands.
            let received = unsafe {
                libc::ioctl(
                    listener.as_raw_fd(),
                    libc::SECCOMP_IOCTL_NOTIF_RECV,
                    &raw mut call,
                )
            };
            if received < 0 {
                continue; // the thread has gone meanwhile
            }
            let errno = if self.counts(call.pid) {
                self.kth.next()
            } else {
                None
            };
            let mut answer = libc::seccomp_notif_resp {
                id: call.id,
                val: 0,
                error: errno.map_or(0, |errno| -errno),
                flags: if errno.is_none() {
                    u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap()
                } else {
                    0
                },
            };
            // SAFETY: `answer` is borrowed for the call.
            let _gone = unsafe {
                libc::ioctl(
                    listener.as_raw_fd(),
                    libc::SECCOMP_IOCTL_NOTIF_SEND,
                    &raw mut answer,
                )
            };
        }
    }

    fn counts(&self, thread: u32) -> bool {
        let name = fs::read_to_string(format!("/proc/self/task/{thread}/comm"));
        name.is_ok_and(|name| match self.threads {
            Some(prefix) => name.starts_with(prefix),
            None => !name.starts_with("sim-"),
        })
    }
}

/// Has all calls with this number, by this thread and those that it makes, sent to the listener.
fn listen(number: i64) -> io::Result<OwnedFd> {
    let load = |offset: usize| libc::sock_filter {
        code: u16::try_from(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS).unwrap(),
        jt: 0,
        jf: 0,
        k: u32::try_from(offset).unwrap(),
    };
    let jump = |k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: u16::try_from(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K).unwrap(),
        jt,
        jf,
        k,
    };
    let give = |k: u32| libc::sock_filter {
        code: u16::try_from(libc::BPF_RET | libc::BPF_K).unwrap(),
        jt: 0,
        jf: 0,
        k,
    };
    // The low half of the fifth argument, on little-endian machines: mmap's file.
    let fifth = std::mem::offset_of!(libc::seccomp_data, args) + 4 * 8;
    let anonymous = if number == libc::SYS_mmap {
        u32::MAX
    } else {
        0xdead_beef // no file that there is
    };
    let mut program = [
        load(std::mem::offset_of!(libc::seccomp_data, nr)),
        jump(u32::try_from(number).unwrap(), 0, 3),
        load(fifth),
        jump(anonymous, 1, 0),
        give(libc::SECCOMP_RET_USER_NOTIF),
        give(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: no memory is named.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the program is borrowed for the call, in which the kernel copies it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).unwrap()) })
}

/// A destination that channels write to, with a state long enough that they do.
fn written_through(from: &mut SimConfig, to: &mut SimConfig) {
    from.len = 1 << 20;
    to.len = from.len;
    to.stream = Stream::PlainWrite;
}

fn scene(call: &Call, kth: &Kth<i32>) -> Scene {
    Scene {
        adjust: if call.number == libc::SYS_pwrite64 {
            written_through
        } else {
            |_, _| {}
        },
        backend: call.backend,
        supervisor: Some(Supervisor {
            number: call.number,
            threads: call.threads,
            kth: kth.clone(),
        }),
        ..Scene::new()
    }
}

/// A kernel whose probe knows no operation: the answer is never filled in.
#[test]
fn an_operation_that_the_kernel_lacks_leads_to_the_other_backend() {
    let mut sweep = Sweep::new("io_uring's probe, empty");
    sweep.counted(2);
    let call = CALLS
        .iter()
        .find(|call| call.number == libc::SYS_io_uring_register)
        .unwrap();
    // The first call of each of the two rings.
    for k in [0, 3] {
        let kth = Kth::new(k, 0);
        let case = format!("an empty probe in call {k}");
        judged(&mut sweep, &case, &scene(call, &kth), Success, || kth.met());
    }
    assert_eq!(sweep.met, 2);
}

#[test]
fn every_system_call_fails() {
    for (salt, call) in (0..).zip(CALLS) {
        let mut sweep = Sweep::new(call.name);
        let none = Kth::none();
        let case = format!("{}: none fails", call.name);
        judged(&mut sweep, &case, &scene(call, &none), Success, || false);
        let count = none.count();
        if count == 0 {
            // Which of them the standard library uses is its own affair.
            continue;
        }
        sweep.counted(count);
        for &(errno, expect) in call.errnos {
            for k in numbers(count, 1 + count / 20, salt) {
                let kth = Kth::new(k, errno);
                let case = format!("{}: {} in call {k}", call.name, name(errno));
                judged(&mut sweep, &case, &scene(call, &kth), expect, || kth.met());
            }
        }
    }
}
