//! Scarce hosts, and settings that cannot be: an error that says what could not be had.

use std::{thread, time::Duration};

use crate::{
    command::{Directory, Ended, listen_under, start, start_under, words},
    rig::{Ends, Rig, Wire, case, end, refused, sound},
    tests,
};

tests! {
    any: [
        settings_that_cannot_be_are_refused,
        a_thousand_devices_are_no_flood,
        whatever_memory_there_is,
        however_many_files_there_may_be,
        budgets_beyond_the_host_are_refused,
    ],
    // To become another user.
    root: [
        however_many_threads_there_may_be,
    ],
}

/// Both ends, each under this in turn. One that has too little refuses, or the migration passes.
fn each_end(under: &str, both: &str) {
    let rig = Rig::over(600_000);
    let ends = Ends {
        both,
        wire: Wire::Tcp,
        receive_under: under,
        ..Ends::default()
    };
    rig.migrate(&ends);

    let rig = Rig::over(600_000);
    let ends = Ends {
        receive_under: "",
        ..ends
    };
    let (receiving, to) = rig.receive(&ends).unwrap();
    let line = format!(
        "send --to {to} {both} --device file:{},id=nic",
        rig.directory.file("source")
    );
    let sent = end(start_under(under, words(&line)));
    if sent.status != Some(0) {
        // It may have ended before it connected.
        thread::sleep(Duration::from_millis(50));
        receiving.signal("INT");
    }
    rig.judge(&sent, &end(receiving));
}

fn whatever_memory_there_is() {
    const BOTH: &str = "--timeout 5 --channels 2";
    // With less the loader of programs fails: that is no status of ours.
    for mib in (24..180).step_by(12) {
        each_end(&format!("ulimit -v {}", mib << 10), BOTH);
    }
    for mib in (24..300).step_by(24) {
        case();
        let under = format!("ulimit -v {}", mib << 10);
        let demo = "demo --devices 8 --state 1MiB --channels 8";
        end(start_under(&under, words(demo)));
        case();
        if let Ok((relay, _)) = listen_under(
            &under,
            words("relay --listen 127.0.0.1:0 --to 127.0.0.1:1 --accept-timeout 0.1"),
        )
        .map_err(sound)
        {
            refused(&end(relay), &[]);
        }
    }
}

fn however_many_files_there_may_be() {
    for files in 5..40 {
        each_end(&format!("ulimit -n {files}"), "--timeout 5 --channels 2");
    }
    // What is asked for takes more than there may be, and that is said at the start.
    let rig = Rig::over(1000);
    let (_, received) = rig.migrate(&Ends {
        both: "--timeout 5 --channels 255",
        receive_under: "ulimit -n 100",
        ..Ends::default()
    });
    refused(&received, &["files"]);
    assert!(!received.stderr.contains("listening"), "{received:?}");
}

fn however_many_threads_there_may_be() {
    for most in 1..14 {
        for backend in ["uring", "blocking"] {
            // A user of its own for each, whose processes are just these.
            let user = 61_000 + most * 2 + u32::from(backend == "uring");
            let under = format!(
                "exec setpriv --reuid {user} --regid {user} --clear-groups prlimit --nproc={most} \
                 \"$0\" \"$@\""
            );
            case();
            let line = format!(
                "receive --listen 127.0.0.1:0 --accept-timeout 20 --timeout 5 --channels 2 \
                 --backend {backend} --device sim:id=a"
            );
            let Ok((receiving, to)) = listen_under(&under, words(&line)).map_err(refuses) else {
                continue;
            };
            let line = format!("send --to {to} --timeout 5 --channels 2 --device sim:id=a");
            let (sent, received) = (end(start(words(&line))), end(receiving));
            assert_eq!(sent.status, received.status, "{sent:?}; {received:?}");

            case();
            // Nobody is there, and it tries again for no longer than that.
            let line = line.replace(&to, "127.0.0.1:1 --connect-timeout 0.1");
            refuses(end(start_under(&under, words(&line))));
            case();
            let demo = format!("demo --devices 2 --state 1MiB --channels 2 --backend {backend}");
            end(start_under(&under, words(&demo)));
        }
    }
}

fn refuses(ended: Ended) {
    refused(&sound(ended), &[]);
}

fn budgets_beyond_the_host_are_refused() {
    for budget in ["1TiB", "100TiB", "4096TiB", "7EiB"] {
        for command in [
            "receive --listen 127.0.0.1:0 --accept-timeout 1 --device sim:id=a",
            "relay --listen 127.0.0.1:0 --to 127.0.0.1:1 --accept-timeout 1",
            "send --to 127.0.0.1:1 --connect-timeout 0.1 --device sim:id=a",
        ] {
            case();
            let ended = end(start(words(&format!("{command} --budget {budget}"))));
            assert!(matches!(ended.status, Some(1 | 2)), "{ended:?}");
            let listened = ended.stderr.contains("listening on");
            // Memory that the host only promises may be had, until it is used.
            assert!(!listened || budget == "1TiB", "{budget}: {ended:?}");
        }
    }
}

fn settings_that_cannot_be_are_refused() {
    let receive = "receive --listen 127.0.0.1:0 --accept-timeout 0.1 --device sim:id=a";
    let send = "send --to 127.0.0.1:1 --connect-timeout 0.1 --device sim:id=a";
    let relay = "relay --listen 127.0.0.1:0 --to 127.0.0.1:1 --accept-timeout 0.1";
    for line in [
        format!("{receive} --channels 0"),
        format!("{receive} --channels 256"),
        format!("{receive} --budget 0"),
        format!("{receive} --budget 1"),
        format!("{receive} --budget 16EiB"),
        format!("{receive} --max-packet 16MiB"),
        format!("{receive} --max-packet 0"),
        format!("{receive} --spill-limit 99EiB"),
        format!("{receive} --spill nowhere"),
        format!("{receive} --timeout 0"),
        format!("{receive} --timeout 1e300"),
        format!("{receive} --timeout -1"),
        format!("{receive} --timeout NaN"),
        format!("{receive} sim:id=a"),
        format!("{send} --channels 0"),
        format!("{send} --packet 0"),
        format!("{send} --packet 1EiB"),
        format!("{send} --budget 16EiB"),
        format!("{send},size=16EiB"),
        format!("{send},size=9223372036854775808"),
        format!("{send},size=9223372036854775807"),
        format!("{send},size=1MiB,precopy=16EiB"),
        format!("{send},instance=4294967296"),
        format!("{relay} --channels 256"),
        format!("{relay} --max-devices 0"),
        format!("{relay} --max-devices 1025"),
        format!("{relay} --page-size 3"),
        "demo --state 9223372036854775808".into(),
        "demo --state 9223372036854775807".into(),
        "demo --state 4EiB".into(),
        "demo --devices 0".into(),
        "demo --devices 4294967295".into(),
        "demo --channels 0".into(),
        "demo --packet 15MiB --budget 1MiB --state 1MiB".into(),
    ] {
        case();
        let ended = end(start(words(&line)));
        assert!(matches!(ended.status, Some(1 | 2)), "{line}: {ended:?}");
    }
    // The longest time that may be is no time-out at all, and nothing breaks for it.
    for (both, send) in [
        (
            "--timeout 1000000 --channels 2",
            "--connect-timeout 1000000",
        ),
        ("--timeout 0.05 --channels 1", ""),
    ] {
        let rig = Rig::over(1000);
        rig.migrate(&Ends {
            both,
            send,
            ..Ends::default()
        });
    }
}

fn a_thousand_devices_are_no_flood() {
    case();
    let directory = Directory::new();
    let devices = |rest: &str| -> String {
        let all = (0..1024).map(|at| format!("sim:id=d{at}{rest} "));
        all.collect()
    };
    let path = directory.file("socket");
    let listened = listen_under(
        "",
        words(&format!(
            "receive --listen unix:{path} --timeout 30 --channels 2 --device {}",
            devices("")
        )),
    );
    let (receiving, _) = match listened {
        Ok(running) => running,
        // So many may be too many, and then the numbers are named.
        Err(ended) => return refused(&sound(ended), &["1024"]),
    };
    let status = std::fs::read_to_string(format!("/proc/{}/status", receiving.id())).unwrap();
    let line = status.lines().find(|it| it.starts_with("VmRSS")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 1 << 20, "{line}");
    receiving.signal("INT");
    assert_eq!(end(receiving).status, Some(130));
}
