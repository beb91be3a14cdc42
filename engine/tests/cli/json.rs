//! `--json`: every command's object, checked against the schema of `docs/json.md`.
//!
//! `Ended::json` and the tests of failures validate every object that they see; here is what they do not see.

use std::fs;

use serde_json::{Value, json};
use vfio_migration::wire::wrap_config;

use crate::{
    command::{Directory, Ended, words},
    names::id,
    packets::{config_packet, hello, packet},
    schema,
    start::run,
};

fn object(ended: &Ended) -> Value {
    schema::object(&ended.stdout)
}

#[test]
fn the_pages_examples_fit_its_schema() {
    let examples = schema::blocks("json");
    assert_eq!(examples.len(), 2);
    for example in &examples {
        assert_eq!(schema::misfit(example), None, "{example:#}");
    }
}

#[test]
fn the_schema_refuses_what_it_does_not_describe() {
    let [good, failure]: [Value; 2] = schema::blocks("json").try_into().unwrap();
    type Change = fn(&mut Value);
    let changes: [(&str, Change); 9] = [
        ("another version", |it| it["version"] = json!(2)),
        ("no version", |it| {
            it.as_object_mut().unwrap().remove("version");
        }),
        ("another command", |it| it["command"] = json!("transmit")),
        ("a key that is not described", |it| it["role"] = json!("x")),
        ("one within a device", |it| {
            it["devices"][0]["name"] = json!("x");
        }),
        ("one within the phases", |it| {
            it["devices"][0]["phases"]["destination"]["stop"] = json!(0.0);
        }),
        ("the other side's phases alone", |it| {
            let phases = &mut it["devices"][0]["phases"];
            *phases = json!({ "source": phases["destination"] });
        }),
        ("a time that is no number", |it| {
            it["totals"]["seconds"] = json!("1 s");
        }),
        ("no totals", |it| {
            it.as_object_mut().unwrap().remove("totals");
        }),
    ];
    for (what, change) in changes {
        let mut changed = good.clone();
        change(&mut changed);
        assert!(schema::misfit(&changed).is_some(), "{what}");
    }
    let mut changed = failure;
    changed["error"].as_object_mut().unwrap().remove("status");
    assert!(schema::misfit(&changed).is_some());
}

#[test]
fn every_subcommand_has_json_and_is_in_the_schema() {
    let help = run(["--help"]).stdout;
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let commands = commands.split("\n\n").next().unwrap();
    let commands = commands
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    let described = schema::blocks("json-schema").remove(0);
    let mut count = 0;
    // What prints no result has none to print as JSON.
    for command in commands.filter(|it| !["help", "man", "completions"].contains(it)) {
        let help = run([command, "--help"]).stdout;
        assert!(help.contains("--json"), "{command}");
        let definition = &described["$defs"][command]["properties"]["command"];
        assert_eq!(definition["const"], command);
        count += 1;
    }
    assert!(count >= 10, "{help}");
}

#[test]
fn an_inspection_has_every_packet_of_every_file() {
    let directory = Directory::new();
    let (one, other) = (directory.file("0\u{202e}.bin"), directory.file("1.bin"));
    let first = [hello(0), packet(0, 0, &[1; 100])].concat();
    let last = config_packet(0, 1, &[2; 7]);
    fs::write(&one, [&*first, &last].concat()).unwrap();
    fs::write(&other, hello(1)).unwrap();
    let ended = run(["inspect", "--json", &one, &other]);
    assert!(!ended.stdout.contains('\u{202e}'));
    let files = ended.json()["files"].take();
    assert_eq!(files[0]["file"], one);
    assert_eq!(files[1]["packets"].as_array().unwrap().len(), 1);
    let packets = files[0]["packets"].as_array().unwrap();
    assert_eq!(packets[0]["kind"], "hello");
    assert_eq!(packets[1]["idx"], 0);
    let config = &packets[2];
    assert_eq!(config["offset"], first.len());
    assert_eq!(
        (&config["kind"], &config["idstr"], &config["size"]),
        (
            &json!("config"),
            &json!(id(0).idstr()),
            &json!(wrap_config(&[2; 7]).len())
        )
    );
    assert_eq!(packets.len(), 3);

    // The lines and the object say the same.
    let lines = run(["inspect", &one]).stdout;
    for (line, packet) in lines.lines().zip(packets) {
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!(words[0], packet["offset"].to_string());
        assert_eq!(words[1], packet["kind"]);
        assert_eq!(words[words.len() - 1], packet["size"].to_string());
    }
    assert_eq!(lines.lines().count(), packets.len());
}

#[test]
fn an_inspection_that_ends_at_a_damaged_packet_has_the_packets_before_it() {
    let directory = Directory::new();
    let path = directory.file("0.bin");
    let whole = [hello(0), packet(0, 0, &[1; 100])].concat();
    fs::write(
        &path,
        [
            &*whole,
            b"garbage, more than a header's worth of it: 0123456789",
        ]
        .concat(),
    )
    .unwrap();
    let ended = run(["inspect", "--json", &path, "/nowhere"]);
    let json = object(&ended);
    assert_eq!(ended.status, Some(1));
    assert_eq!(json["files"].as_array().unwrap().len(), 1);
    assert_eq!(json["files"][0]["packets"].as_array().unwrap().len(), 2);
    let message = json["error"]["message"].as_str().unwrap();
    assert!(
        message.contains(&format!("byte {}", whole.len())),
        "{message}"
    );
    assert_eq!(ended.stderr, format!("vfio-migrate: {message}\n"));

    let ended = run(["inspect", "--json", "/nowhere"]);
    assert_eq!(ended.status, Some(1));
    assert_eq!(object(&ended)["files"], json!([]));
}

#[test]
fn wrong_use_names_the_command_where_there_is_one() {
    for (line, command) in [
        ("inspect --json", json!("inspect")),
        ("frobnicate --json", Value::Null),
        ("--json", Value::Null),
    ] {
        let ended = run(words(line));
        assert_eq!(ended.status, Some(2), "{ended:?}");
        let object = object(&ended);
        assert_eq!(object["command"], command, "{line}");
        assert_eq!(object["error"]["kind"], "usage");
    }
}
