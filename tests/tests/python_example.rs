//! The Python example settles a trade against `verdict dev`: a client in another language, from the contract alone.

use std::{
    env,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

/// A cluster is ready in seconds; a loaded machine gets more.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// `verdict dev`, ended with the test, however that ends.
struct Dev(Child);

impl Drop for Dev {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_python_client_settles_a_trade() {
    if Command::new("python3").arg("--version").output().is_err() {
        assert!(env::var_os("CI").is_none(), "CI must have python3: run scripts/setup.sh --test");
        eprintln!("SKIPPED: there is no python3 here; scripts/setup.sh --test installs it");
        return;
    }
    let folder = tempfile::tempdir().expect("make a folder for the cluster");
    let address = free_address();
    let _dev = start_dev(&address, folder.path());

    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/python/run.sh");
    let status = Command::new(example).arg(&address).status().expect("run examples/python/run.sh");

    assert!(status.success(), "the example ended with {status}; what it met stands above");
}

/// An address that was free a moment ago.
fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("find a free port");
    listener.local_addr().expect("a bound listener has an address").to_string()
}

/// Starts `verdict dev` and waits until it says that it is ready.
fn start_dev(address: &str, folder: &Path) -> Dev {
    let program = program();
    let mut child = Command::new(&program)
        .args(["dev", "--listen", address, "--data"])
        .arg(folder)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("start {}: {error}", program.display()));
    let lines = BufReader::new(child.stdout.take().expect("stdout is piped")).lines();
    let dev = Dev(child);

    // Read to the end, or the program would stop at a full pipe. The sender is dropped when the program ends.
    let (ready, when_ready) = mpsc::channel();
    thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            println!("verdict dev: {line}");
            if line.contains("ready") {
                // Nobody waits any more if it says so twice.
                let _ = ready.send(());
            }
        }
    });
    when_ready
        .recv_timeout(READY_WITHIN)
        .unwrap_or_else(|error| panic!("`verdict dev` was not ready within {READY_WITHIN:?}: {error}"));
    dev
}

/// The program under test: `VERDICT_BIN`, or the debug build beside this test program.
fn program() -> PathBuf {
    env::var_os("VERDICT_BIN").map(PathBuf::from).unwrap_or_else(|| {
        let this = env::current_exe().expect("this program has a path");
        let debug = this.parent().and_then(Path::parent).expect("test programs lie in debug/deps");
        debug.join("verdict")
    })
}
