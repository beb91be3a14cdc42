//! What the command says to sizes, counts and times that cannot be, and to a host that lacks something.
#![cfg(feature = "cli")]
#![allow(missing_docs, reason = "a test")]

mod command;

use command::{run, words};

/// The options of a command that take a number, by its help.
fn numbers(command: &str) -> Vec<String> {
    let help = run(words(&format!("{command} --help"))).stdout;
    let options = help.lines().filter_map(|line| line.trim().split_once(" <"));
    let number = |kind: &str| {
        ["SIZE>", "N>", "SECONDS>"]
            .iter()
            .any(|of| kind.starts_with(of))
    };
    options
        .filter(|(name, kind)| name.starts_with("--") && number(kind))
        .map(|(name, _)| name.to_owned())
        .collect()
}

#[test]
fn a_number_that_cannot_be_is_refused_where_it_is_typed() {
    let mut tried = 0;
    for command in ["demo", "send", "receive", "relay", "replay", "inspect"] {
        for option in numbers(command) {
            // 2^64, what no type holds, and no number.
            for value in ["18446744073709551616", "1e400", "-1", "NaN", ""] {
                let ended = run([command, &format!("{option}={value}")]);
                assert_eq!(
                    ended.status,
                    Some(2),
                    "{command} {option}={value}: {ended:?}"
                );
                assert!(ended.stderr.contains(&option), "{ended:?}");
                tried += 1;
            }
        }
    }
    assert!(tried > 80, "{tried}");
    for (arguments, why) in [
        ("demo --state 9223372036854775808", "at most 1024 TiB"),
        ("demo --state 8192PiB", "at most 1024 TiB"),
        ("demo --devices 1025", "--devices"),
        ("demo --channels 256", "--channels"),
        ("demo --packet 16MiB", "less than 16 MiB"),
        ("demo --budget 9223372036854775808", "can address"),
        (
            "send --to unix:x --device sim:id=a,size=9223372036854775808",
            "at most 1024 TiB",
        ),
        (
            "send --to unix:x --device sim:id=a,precopy=9223372036854775808",
            "at most 1024 TiB",
        ),
        (
            "send --to unix:x --device sim:id=a --timeout 1e18",
            "1000000 seconds",
        ),
    ] {
        let ended = run(words(arguments));
        assert_eq!(ended.status, Some(2), "{arguments}: {ended:?}");
        assert!(ended.stderr.contains(why), "{arguments}: {ended:?}");
    }
}
