//! The layer under a real process: this program again, with the library loaded.

use std::{
    collections::BTreeSet,
    env,
    fs::{self, File, OpenOptions},
    io::{Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tempfile::TempDir;

/// Says what the child is to do.
const PART: &str = "VERDICT_DISK_TEST_PART";

fn library() -> PathBuf {
    let this = env::current_exe().unwrap();
    let deps = this.parent().unwrap();
    let places = [deps.join("libverdict_disk.so"), deps.parent().unwrap().join("libverdict_disk.so")];
    places.into_iter().find(|place| place.exists()).expect("build it: cargo build -p verdict-disk")
}

struct Disk {
    root: TempDir,
}

impl Disk {
    fn new() -> Disk {
        Disk { root: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Runs a part of this program on the disk, after a loss of power if there is a seed.
    fn run(&self, part: &str, seed: Option<u64>) -> Output {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", "child", "--nocapture"]).env(PART, part).current_dir(self.root.path());
        command.env("LD_PRELOAD", library()).env("VERDICT_DISK_FOLDER", self.path("data"));
        command.env("VERDICT_DISK_CONTROL", self.path("control"));
        command.env("VERDICT_DISK_SHADOW", self.path("shadow"));
        if let Some(seed) = seed {
            command.env("VERDICT_DISK_LOSE_POWER", seed.to_string());
        }
        command.output().unwrap()
    }

    fn run_well(&self, part: &str) {
        let output = self.run(part, None);
        assert!(output.status.success(), "{output:?}");
    }

    /// What stands below `data` after each of many losses of power: names with contents.
    fn after_losses(part: &str, look: impl Fn(&Path)) {
        for seed in 0..30 {
            let disk = Disk::new();
            disk.run_well(part);
            let output = disk.run("nothing", Some(seed));
            assert!(output.status.success(), "{output:?}");
            look(&disk.path("data"));
        }
    }
}

fn sync_folder(path: &str) {
    File::open(path).unwrap().sync_all().unwrap();
}

/// What the child does; without a part it does nothing.
#[test]
fn child() {
    let Ok(part) = env::var(PART) else { return };
    match part.as_str() {
        "nothing" => {}
        // Every way of writing that a node uses, synced, then the same unsynced.
        "ways" => {
            fs::create_dir("data/sub").unwrap();
            sync_folder("data");
            let mut file = File::create("data/sub/file").unwrap();
            sync_folder("data/sub");
            file.write_all(&[1; 5000]).unwrap();
            file.seek(SeekFrom::Start(100)).unwrap();
            file.write_all(&[2; 100]).unwrap();
            file.write_all_at(&[3; 5000], 20_000).unwrap();
            file.try_clone().unwrap().write_all_at(&[4; 10], 0).unwrap();
            file.sync_data().unwrap();
            let mut other = OpenOptions::new().append(true).open("data/sub/file").unwrap();
            other.write_all(&[5; 7]).unwrap();
            other.sync_all().unwrap();
            file.set_len(24_000).unwrap();
            file.sync_all().unwrap();
            file.write_all_at(&[9; 40_000], 24_000).unwrap();
        }
        "names" => {
            fs::write("data/never-synced", [1; 10]).unwrap();
            let mut file = File::create("data/contents-synced").unwrap();
            file.write_all(&[1; 10]).unwrap();
            file.sync_all().unwrap();
            fs::write("data/current.new", "1").unwrap();
            File::open("data/current.new").unwrap().sync_all().unwrap();
            fs::rename("data/current.new", "data/current").unwrap();
            fs::write("data/temporary", "1").unwrap();
            sync_folder("data");
            fs::remove_file("data/temporary").unwrap();
            fs::write("data/current.new", "2").unwrap();
            File::open("data/current.new").unwrap().sync_all().unwrap();
            fs::rename("data/current.new", "data/current").unwrap();
        }
        "fail" => {
            let mut file = File::create("data/file").unwrap();
            sync_folder("data");
            file.write_all(&[1; 4096]).unwrap();
            fs::write("control", "fail_sync = 1").unwrap();
            assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
            // Whoever tries again is told that all is well, and it isn't.
            file.sync_all().unwrap();
        }
        "full" => {
            let mut file = File::create("data/file").unwrap();
            fs::write("control", "free_bytes = 10").unwrap();
            assert_eq!(file.write(&[1; 16]).unwrap(), 10);
            assert_eq!(file.write(&[1; 6]).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            assert_eq!(file.write_at(&[2; 5], 0).unwrap(), 5, "what is there may be written over");
            assert_eq!(File::create("data/other").unwrap_err().raw_os_error(), Some(libc::ENOSPC));
            assert!(File::create("elsewhere").is_ok());
            fs::remove_file("control").unwrap();
            assert_eq!(file.write(&[1; 6]).unwrap(), 6);
        }
        "slow" => {
            let file = File::create("data/file").unwrap();
            fs::write("control", "slow_sync_ms = 200").unwrap();
            let began = std::time::Instant::now();
            file.sync_all().unwrap();
            assert!(began.elapsed().as_millis() >= 200);
        }
        "unfollowed rename" => fs::rename("data", "data/../renamed").unwrap(),
        "unfollowed folder" => {
            fs::create_dir("data/a").unwrap();
            fs::write("data/a/file", "").unwrap();
            fs::rename("data/a/file", "data/file").unwrap();
        }
        "unfollowed write" => {
            let mut file = File::create("data/file").unwrap();
            file.write_all(b"followed").unwrap();
            let path = c"data/file";
            // SAFETY: a descriptor of the kernel's own call, which nobody has watched being opened.
            let fd =
                unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_WRONLY) };
            assert!(fd >= 0);
        }
        part => panic!("no part {part}"),
    }
}

#[test]
fn whatever_was_synced_survives_by_any_way_of_writing() {
    let mut lengths = BTreeSet::new();
    let mut expected = vec![0; 24_000];
    expected[..5000].fill(1);
    expected[100..200].fill(2);
    expected[20_000..].fill(3);
    expected[..10].fill(4);
    let lengths_seen = std::cell::RefCell::new(&mut lengths);
    Disk::after_losses("ways", |data| {
        let found = fs::read(data.join("sub/file")).unwrap();
        assert!(found.len() >= 24_000, "{} bytes", found.len());
        assert!(found[..24_000] == expected, "what was synced has changed");
        assert!(found[24_000..].iter().all(|byte| [0, 9].contains(byte)));
        lengths_seen.borrow_mut().insert(found.len());
    });
    assert!(lengths.len() > 2, "what wasn't synced always survived, or never: {lengths:?}");
}

#[test]
fn names_survive_when_their_folder_was_synced() {
    let seen = std::cell::RefCell::new(BTreeSet::new());
    Disk::after_losses("names", |data| {
        assert_eq!(fs::read(data.join("contents-synced")).unwrap(), [1; 10]);
        assert!(fs::read(data.join("never-synced")).unwrap().len() <= 10);
        let current = fs::read_to_string(data.join("current")).unwrap();
        assert!(["1", "2"].contains(&current.as_str()), "{current}");
        let names: Vec<String> = fs::read_dir(data)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| ["temporary", "current.new"].contains(&name.as_str()))
            .collect();
        seen.borrow_mut().insert((current, names));
    });
    // Nothing, the removal, with it the new file, with it the rename: in this order.
    assert!(seen.borrow().len() >= 3, "{seen:?}");
    assert!(seen.borrow().iter().all(|(current, names)| current == "1" || names.is_empty()), "{seen:?}");
}

#[test]
fn what_a_failed_sync_should_have_kept_stays_lost() {
    let lost = std::cell::Cell::new(0);
    Disk::after_losses("fail", |data| {
        lost.set(lost.get() + usize::from(fs::read(data.join("file")).unwrap() != [1; 4096]));
    });
    assert!(lost.get() >= 5, "lost {} times of 30", lost.get());
}

#[test]
fn a_full_disk_and_a_slow_one() {
    for part in ["full", "slow"] {
        Disk::new().run_well(part);
    }
}

#[test]
fn what_cannot_be_followed_ends_the_process() {
    for (part, why) in [
        ("unfollowed rename", "only files are renamed"),
        ("unfollowed folder", "only files are renamed"),
        ("unfollowed write", "of the kernel isn't followed"),
    ] {
        let disk = Disk::new();
        let output = disk.run(part, None);
        assert!(!output.status.success(), "{part}: {output:?}");
        let told = fs::read_to_string(disk.path("shadow/failed")).unwrap();
        assert!(told.contains(why), "{part}: {told}");
    }
}
