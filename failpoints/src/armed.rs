//! What is armed in this process, and what is done there.

use std::{
    fmt::Display,
    fs, io,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::process::{Signal, getpid, kill_process};

use crate::{FAILPOINTS, Failpoint, Point};

/// How often a file is looked at that says what is armed.
const LOOK: Duration = Duration::from_millis(5);

/// Whether anything is armed.
static ANY: AtomicBool = AtomicBool::new(false);
static ARMED: Mutex<Vec<Armed>> = Mutex::new(Vec::new());

/// One order.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Armed {
    point: Point,
    group: Option<u32>,
    action: Action,
    /// Done at this hit...
    at: u64,
    /// ...and at every later one.
    always: bool,
    hits: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
    Sleep(Duration),
    Error,
}

/// A process comes to a failpoint.
#[doc(hidden)]
pub fn hit(point: &'static Failpoint, groups: impl IntoIterator<Item = u32>) -> io::Result<()> {
    if ANY.load(Ordering::Relaxed) { do_what_is_armed(point, groups.into_iter().collect()) } else { Ok(()) }
}

#[cold]
fn do_what_is_armed(point: &'static Failpoint, groups: Vec<u32>) -> io::Result<()> {
    if groups.is_empty() {
        return Ok(());
    }
    let mut due = None;
    for armed in lock().iter_mut() {
        let meant = armed.point.name == point.name && armed.group.is_none_or(|group| groups.contains(&group));
        armed.hits += u64::from(meant);
        if meant && (armed.hits == armed.at || armed.always && armed.hits > armed.at) {
            due = Some((armed.action, armed.hits));
            break;
        }
    }
    let Some((action, hits)) = due else { return Ok(()) };
    // The time, for whoever measures what follows.
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    eprintln!(
        "failpoint {} of groups {groups:?}, hit {hits}, at {} us: {action:?}",
        point.name,
        since.as_micros()
    );
    match action {
        Action::Kill => loop {
            signal(Signal::KILL);
        },
        Action::Stop => signal(Signal::STOP),
        Action::Sleep(duration) => thread::sleep(duration),
        Action::Error => return Err(io::Error::other(format!("failpoint {}", point.name))),
    }
    Ok(())
}

fn signal(signal: Signal) {
    kill_process(getpid(), signal).expect("a process may send signals to itself");
}

/// Arms what the variable says.
pub(crate) fn start(variable: Option<String>) -> Result<(), String> {
    let Some(text) = variable else { return Ok(()) };
    let Some(path) = text.strip_prefix('@') else { return arm(&text) };
    let path = path.to_owned();
    // There may be nothing to do yet.
    let mut known = fs::read_to_string(&path).unwrap_or_default();
    arm(&known)?;
    let look = move || loop {
        thread::sleep(LOOK);
        let now = fs::read_to_string(&path).unwrap_or_default();
        if now != known {
            if let Err(error) = arm(&now) {
                eprintln!("failpoints: {error}");
            }
            known = now;
        }
    };
    let started = thread::Builder::new().name("failpoints".to_owned()).spawn(look);
    started.map(drop).map_err(|error| error.to_string())
}

/// Arms exactly what the text says.
fn arm(text: &str) -> Result<(), String> {
    let orders = text.split(';').map(str::trim).filter(|order| !order.is_empty());
    let armed = orders.map(parse).collect::<Result<Vec<_>, _>>()?;
    let any = !armed.is_empty();
    *lock() = armed;
    ANY.store(any, Ordering::Relaxed);
    Ok(())
}

/// Reads `NAME[/GROUP]=ACTION[@HIT[+]]`.
fn parse(order: &str) -> Result<Armed, String> {
    let wrong = |what: &dyn Display| format!("{order:?}: {what}");
    let (place, action) = order.split_once('=').ok_or_else(|| wrong(&"expected NAME=ACTION"))?;
    let (name, group) = match place.split_once('/') {
        None => (place, None),
        Some((name, group)) => (name, Some(group.parse().map_err(|error| wrong(&error))?)),
    };
    let point = FAILPOINTS.iter().find(|point| point.name == name);
    let point = point.ok_or_else(|| wrong(&"there is no failpoint of that name"))?;
    let (action, at) = action.split_once('@').unwrap_or((action, "1"));
    let (at, always) = at.strip_suffix('+').map_or((at, false), |at| (at, true));
    let at: u64 = at.parse().map_err(|error| wrong(&error))?;
    let action = match (action, action.strip_prefix("sleep:")) {
        ("kill", _) => Action::Kill,
        ("stop", _) => Action::Stop,
        ("error", _) if point.fails => Action::Error,
        ("error", _) => return Err(wrong(&"this failpoint can't give an error")),
        (_, Some(duration)) => {
            Action::Sleep(Duration::from_millis(duration.parse().map_err(|error| wrong(&error))?))
        }
        _ => return Err(wrong(&"expected kill, stop, error or sleep:MILLISECONDS")),
    };
    Ok(Armed { point, group, action, at, always, hits: 0 })
}

fn lock() -> MutexGuard<'static, Vec<Armed>> {
    ARMED.lock().expect("nothing panics while it holds this lock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_understood_or_refused_with_a_reason() {
        let armed = parse("vote-before-send/2=kill@17").unwrap();
        assert_eq!(
            (armed.point.name, armed.group, armed.action),
            ("vote-before-send", Some(2), Action::Kill)
        );
        assert_eq!((armed.at, armed.always), (17, false));
        let armed = parse("decision-recorded=sleep:500@3+").unwrap();
        assert_eq!(
            (armed.action, armed.at, armed.always),
            (Action::Sleep(Duration::from_millis(500)), 3, true)
        );
        for (order, why) in [
            ("vote-before-send", "expected NAME=ACTION"),
            ("no-such=kill", "no failpoint"),
            ("vote-sent=error", "can't give an error"),
            ("vote-sent=burn", "expected kill"),
            ("vote-sent=kill@x", "invalid digit"),
        ] {
            let error = parse(order).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn an_armed_failpoint_acts_at_its_hit_for_its_group_alone() {
        arm("log-before-sync/3=error@2; log-before-write=error@2+").unwrap();
        let hit = |point, groups: &[u32]| super::hit(point, groups.iter().copied()).is_err();
        let [sync, write] = [&crate::LOG_BEFORE_SYNC, &crate::LOG_BEFORE_WRITE];
        let of_group_3: Vec<bool> =
            [&[1, 3][..], &[1], &[3], &[3]].iter().map(|groups| hit(sync, groups)).collect();
        assert_eq!(of_group_3, [false, false, true, false]);
        assert_eq!([hit(write, &[1]), hit(write, &[]), hit(write, &[2])], [false, false, true]);
        arm("").unwrap();
        assert!(!hit(write, &[1]));
    }
}
