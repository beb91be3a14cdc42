//! Signals in each phase: who is told to end ends, tells its peer, and leaves nothing behind.

use std::{fs, io::Write, os::unix::net::UnixStream, path::Path, thread, time::Duration};

use nix::{sys::stat::Mode, unistd::mkfifo};

use crate::{
    command::{Directory, Ended, listen, start, start_under, words},
    link::{Fate, Link},
    rig::{BOUND, Ends, Rig, case, end, refused, sound, until},
    running::start_unread,
    tests,
};

tests! {
    any: [
        before_it_is_the_command,
        a_stopped_process_goes_on,
        while_nobody_is_there,
        while_a_source_is_awaited,
        in_the_set_up,
        while_the_devices_still_run,
        in_the_downtime,
        while_the_verdict_is_awaited,
        while_files_are_written,
        in_a_relay,
        in_a_demo,
        where_nobody_reads_what_is_said,
    ],
    root: [],
}

const SIGNALS: [&str; 3] = ["INT", "TERM", "HUP"];

/// It was told to end, and says so.
fn obeyed(ended: &Ended, signal: &str) {
    let known = [Some(130), Some(143), Some(129)];
    let expected = match signal {
        "INT" => &known[..1],
        _ => &known[..],
    };
    assert!(expected.contains(&ended.status), "{signal}: {ended:?}");
}

fn pause() {
    thread::sleep(Duration::from_millis(300));
}

/// The signal waits until somebody is there who minds it: a test on a busy machine is sooner than an exec.
fn before_it_is_the_command() {
    for signal in SIGNALS {
        case();
        let nobody = words("send --to 127.0.0.1:1 --connect-timeout 100 --device sim:id=a");
        let sending = start_under("sleep 0.3", nobody);
        sending.signal(signal);
        obeyed(&end(sending), signal);
    }
}

fn while_nobody_is_there() {
    for signal in SIGNALS {
        case();
        let directory = Directory::new();
        let to = format!("unix:{}", directory.file("nobody"));
        let sending = start(words(&format!(
            "send --to {to} --connect-timeout 100 --device sim:id=a"
        )));
        pause();
        sending.signal(signal);
        obeyed(&end(sending), signal);
    }
}

fn while_a_source_is_awaited() {
    for signal in SIGNALS {
        let rig = Rig::over(1000);
        let (receiving, _) = rig.receive(&Ends::default()).unwrap();
        receiving.signal(signal);
        obeyed(&end(receiving), signal);
        rig.untouched(&[]);
    }
}

fn in_the_set_up() {
    for signal in SIGNALS {
        // A destination that says nothing: for the source.
        let rig = Rig::new(1000);
        let path = rig.directory.file("silent");
        let silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let sending = rig.send(
            &format!("unix:{path}"),
            &Ends {
                both: "--timeout 100 --channels 2",
                ..Ends::default()
            },
        );
        let (_main, _) = silent.accept().unwrap();
        pause();
        sending.signal(signal);
        obeyed(&end(sending), signal);

        // A source that says QEVM and no more: for the destination.
        let rig = Rig::over(1000);
        let (receiving, _) = rig.receive(&Ends::default()).unwrap();
        let mut main = UnixStream::connect(rig.directory.file("socket")).unwrap();
        main.write_all(b"QEVM").unwrap();
        pause();
        receiving.signal(signal);
        obeyed(&end(receiving), signal);
        rig.untouched(&[]);
    }
}

/// Both run, with these devices; one of them is told to end, and the other hears of it.
fn both(options: &str, source: &str, file: bool) {
    for signal in SIGNALS {
        for at_the_source in [true, false] {
            let rig = Rig::over(1000);
            let device = if file {
                format!("--device file:{},id=nic", rig.target())
            } else {
                "--device sim:id=nic".into()
            };
            let ends = Ends {
                both: &format!("--timeout 20 --channels 2 {options}"),
                send: source,
                receive: &device,
                ..Ends::default()
            };
            let (receiving, to) = rig.receive(&ends).unwrap();
            let sending = rig.send(&to, &ends);
            pause();
            let (told, other) = if at_the_source {
                (sending, receiving)
            } else {
                (receiving, sending)
            };
            told.signal(signal);
            obeyed(&end(told), signal);
            refused(&end(other), &["has failed"]);
            rig.untouched(&[]);
        }
    }
}

fn while_the_devices_still_run() {
    both(
        "--precopy-over-channels",
        "--device sim:id=nic,size=1024GiB,precopy=1024GiB",
        false,
    );
}

fn in_the_downtime() {
    both("", "--device sim:id=nic,size=1024GiB", false);
}

fn while_files_are_written() {
    // To a disk that is not asked for much: the destination is stopped before it has it all.
    both("--budget 4MiB", "--device sim:id=nic,size=1GiB", true);
}

fn while_the_verdict_is_awaited() {
    for signal in SIGNALS {
        let rig = Rig::new(100_000);
        let ends = Ends {
            both: "--timeout 20 --channels 2",
            ..Ends::default()
        };
        let (receiving, to) = rig.receive(&ends).unwrap();
        // What comes back is lost behind the word that it is ready.
        let fate = Fate {
            mute_at: Some(1),
            ..Fate::default()
        };
        let link = Link::new("127.0.0.1:0", &to, fate).unwrap();
        let sending = rig.send(&link.address, &ends);
        until("all has come", || {
            fs::read(rig.target()).is_ok_and(|it| it == rig.state)
        });
        pause();
        sending.signal(signal);
        let sent = end(sending);
        obeyed(&sent, signal);
        assert!(
            sent.stderr.contains("the destination's status alone says"),
            "{sent:?}"
        );
        drop(link);
        // It has all; or it has heard in time that its source has given up.
        let received = end(receiving);
        if received.status == Some(0) {
            rig.arrived(&[]);
        }
    }
}

fn in_a_relay() {
    for signal in SIGNALS {
        for busy in [false, true] {
            let rig = Rig::over(1000);
            let ends = Ends {
                both: "--timeout 20 --channels 2",
                send: "--device sim:id=nic,size=1024GiB",
                receive: "--device sim:id=nic",
                ..Ends::default()
            };
            let (receiving, to) = rig.receive(&ends).unwrap();
            let (relay, through) = listen(words(&format!(
                "relay --listen 127.0.0.1:0 --to {to} --timeout 20 --channels 2"
            )));
            let sending = busy.then(|| rig.send(&through, &ends));
            pause();
            relay.signal(signal);
            obeyed(&end(relay), signal);
            match sending {
                Some(sending) => {
                    refused(&end(sending), &[]);
                    refused(&end(receiving), &[]);
                }
                None => {
                    receiving.signal("INT");
                    obeyed(&end(receiving), "INT");
                }
            }
            rig.untouched(&[]);
        }
    }
}

fn in_a_demo() {
    for signal in SIGNALS {
        case();
        let demo = start(words("demo --devices 2 --state 1GiB --channels 1"));
        pause();
        demo.signal(signal);
        let ended = end(demo);
        if ended.status != Some(0) {
            obeyed(&ended, signal);
        }
    }
}

fn where_nobody_reads_what_is_said() {
    let directory = Directory::new();
    let fifo = directory.file("fifo");
    mkfifo(Path::new(&fifo), Mode::S_IRWXU).unwrap();
    // Its packets, a line each, fill the pipe.
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/05-xfer-on-2dev-3ch");
    let channel = data.join("01-c2s.bin");
    let files: Vec<_> = std::iter::repeat_n(channel.to_str().unwrap().to_owned(), 400).collect();
    for signal in SIGNALS {
        case();
        let running = start_unread(["inspect".to_owned()].into_iter().chain(files.clone()));
        pause();
        running.signal(signal);
        let ended = sound(running.end_within(BOUND));
        assert!(ended.status != Some(1), "{ended:?}");
    }
}

fn a_stopped_process_goes_on() {
    for stop_the_source in [true, false] {
        let rig = Rig::over(8_000_000);
        let ends = Ends {
            both: "--timeout 20 --channels 2",
            ..Ends::default()
        };
        let (receiving, to) = rig.receive(&ends).unwrap();
        let sending = rig.send(&to, &ends);
        let stopped = if stop_the_source {
            &sending
        } else {
            &receiving
        };
        thread::sleep(Duration::from_millis(20));
        stopped.signal("STOP");
        pause();
        stopped.signal("CONT");
        let (sent, received) = (end(sending), end(receiving));
        assert_eq!(sent.status, Some(0), "{sent:?}");
        rig.judge(&sent, &received);
    }
}
