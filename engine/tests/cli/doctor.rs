//! `doctor`, on whatever host this is: what it says is the same to people and to programs, and a limit that
//! is too low has a name, an advice and a status.

use serde_json::Value;

use crate::{
    command::{start_under, words},
    schema,
    start::run,
};

fn finding<'a>(report: &'a Value, what: &str) -> &'a Value {
    let findings = report["findings"].as_array().unwrap();
    findings.iter().find(|it| it["what"] == what).unwrap()
}

#[test]
fn what_is_found_is_said_alike_to_people_and_programs() {
    let told = run(words("doctor --leave-devices"));
    let json = run(words("doctor --leave-devices --json"));
    assert_eq!(told.status, json.status, "{told:?}");
    let report = schema::object(&json.stdout);
    let findings = report["findings"].as_array().unwrap();
    for what in [
        "kernel",
        "io_uring",
        "open files",
        "threads",
        "memory",
        "huge pages",
        "VFIO",
    ] {
        let it = finding(&report, what);
        let line = told
            .stdout
            .lines()
            .find(|line| line.starts_with(what))
            .unwrap();
        assert!(line.contains(it["status"].as_str().unwrap()), "{line}");
        // What is not good has an advice, and nothing else has.
        assert_eq!(it["status"] == "good", it.get("advice").is_none(), "{it}");
        if let Some(advice) = it.get("advice") {
            assert!(told.stdout.contains(advice.as_str().unwrap()), "{advice}");
        }
    }
    let missing = findings.iter().any(|it| it["status"] == "missing");
    assert_eq!(told.status, Some(i32::from(missing)), "{told:?}");
    // This very kernel runs it.
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let version = release.split(['-', '+']).next().unwrap().trim();
    let found = finding(&report, "kernel")["found"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(found.contains(version), "{found}, {version}");
}

#[test]
fn a_limit_that_is_too_low_is_missing_by_name() {
    let ended = start_under(
        "ulimit -n 100",
        words("doctor --leave-devices --json --channels 200"),
    )
    .end();
    assert_eq!(ended.status, Some(1), "{ended:?}");
    assert!(ended.stderr.contains("open files"), "{ended:?}");
    let report = schema::object(&ended.stdout);
    assert_eq!(report["status"], "missing");
    let it = finding(&report, "open files");
    assert_eq!(it["status"], "missing");
    assert!(
        it["advice"].as_str().unwrap().contains("LimitNOFILE="),
        "{it}"
    );
    let ended = run(words("doctor --channels 256"));
    assert_eq!(ended.status, Some(2), "{ended:?}");
}
