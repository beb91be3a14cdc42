//! Certificates for tests of the command, made by `openssl`.

use std::{fs, path::PathBuf, process::Command};

use crate::command::Directory;

/// How long a certificate is valid, as `openssl ca` has it.
pub const VALID: [&str; 2] = ["200101000000Z", "491231235959Z"];
pub const EXPIRED: [&str; 2] = ["200101000000Z", "200102000000Z"];

/// An authority, with its files.
pub struct Authority {
    directory: Directory,
}

const CONFIG: &str = "
[req]
distinguished_name = name
x509_extensions = authority
prompt = no
[name]
commonName = the tests' authority
[authority]
basicConstraints = critical,CA:TRUE
[ca]
default_ca = leaf
[leaf]
database = index
default_md = sha256
policy = policy
rand_serial = yes
new_certs_dir = .
unique_subject = no
[policy]
commonName = supplied
";

impl Authority {
    pub fn new() -> Self {
        let authority = Self {
            directory: Directory::new(),
        };
        fs::write(authority.path("config"), CONFIG).unwrap();
        fs::write(authority.path("index"), "").unwrap();
        // Each has a name of its own: of two with one name, the other's certificates are badly signed.
        let name = authority.directory.path().file_name().unwrap();
        authority.openssl(&format!(
            "req -x509 -config config -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 \
             -subj /CN={} -keyout ca.key -out ca.pem",
            name.display()
        ));
        authority
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn openssl(&self, line: &str) {
        let output = Command::new("openssl")
            .args(line.split_whitespace())
            .current_dir(self.directory.path())
            .output()
            .expect("openssl, which has to be installed");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "openssl {line}: {error}");
    }

    /// Makes a certificate with such a subjectAltName, `name.pem`, and its key, `name.key`.
    pub fn certificate(&self, name: &str, names: &str, [from, to]: [&str; 2]) {
        fs::write(
            self.path(&format!("{name}.ext")),
            format!("subjectAltName = {names}\n"),
        )
        .unwrap();
        self.openssl(&format!(
            "req -new -config config -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} \
             -keyout {name}.key -out {name}.csr"
        ));
        self.openssl(&format!(
            "ca -batch -config config -cert ca.pem -keyfile ca.key -in {name}.csr -out {name}.pem -notext \
             -startdate {from} -enddate {to} -extfile {name}.ext"
        ));
    }

    pub fn file(&self, file: &str) -> String {
        self.directory.file(file)
    }

    /// The command's options for a certificate of this authority, which takes those of `ca`.
    pub fn options(&self, prefix: &str, name: &str, ca: &Self) -> String {
        format!(
            " --{prefix}tls-cert {} --{prefix}tls-key {} --{prefix}tls-ca {}",
            self.file(&format!("{name}.pem")),
            self.file(&format!("{name}.key")),
            ca.file("ca.pem"),
        )
    }
}
