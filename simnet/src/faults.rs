//! What goes wrong in a simulation, and when: drawn from the seed.

use std::{collections::BTreeMap, rc::Rc, time::Duration};

use turmoil::Sim;
use verdict_tests::random::Random;

use crate::{
    cluster::{Host, name},
    trace,
};

/// Latencies of a link that is well, in milliseconds.
pub(crate) const LATENCY_MS_MAX: u64 = 5;
/// A sync of a disk that is well takes this long at most, in milliseconds.
const SYNC_MS_MAX: u64 = 2;
/// How far a wall clock jumps at most, in seconds. (An id whose time lies 10 minutes ahead of the leader's clock is
/// refused, as documented.)
const JUMP_SECONDS_MAX: u64 = 500;

/// Something that is wrong, and until when.
struct Wrong {
    what: What,
    until: Duration,
}

enum What {
    /// These hosts are down.
    Down(u64),
    /// Messages from one host to another are lost.
    Cut(Vec<(String, String)>),
    /// Messages between two hosts wait.
    Held(String, String),
    /// Messages between these hosts are slow.
    Slow(Vec<(String, String)>),
    /// The disk is slow, or full.
    Disk(u64),
}

/// How a host goes down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    /// The process is killed: what it wrote stays.
    Killed,
    /// The machine loses its power: what it didn't sync may be lost.
    PowerLost,
}

/// Makes things go wrong, and right again.
pub(crate) struct Faults {
    random: Random,
    hosts: Vec<Rc<Host>>,
    /// All hosts, those of clients too.
    names: Vec<String>,
    wrong: Vec<Wrong>,
    /// Links that are cut now, in their direction.
    cut: BTreeMap<(String, String), bool>,
    next: Duration,
    pause_ms_max: u64,
    fired: BTreeMap<&'static str, u64>,
}

impl Faults {
    pub(crate) fn new(mut random: Random, hosts: Vec<Rc<Host>>, clients: &[String]) -> Faults {
        let mut names: Vec<String> = hosts.iter().map(|host| name(host.number)).collect();
        names.extend_from_slice(clients);
        let pause_ms_max = *random.pick(&[300, 1000, 2500]);
        for host in &hosts {
            host.disk.fault(|faults| faults.sync_ms_max = SYNC_MS_MAX);
        }
        Faults {
            random,
            hosts,
            names,
            wrong: Vec::new(),
            cut: BTreeMap::new(),
            next: Duration::ZERO,
            pause_ms_max,
            fired: BTreeMap::new(),
        }
    }

    /// How often each kind has fired.
    pub(crate) fn fired(&self) -> &BTreeMap<&'static str, u64> {
        &self.fired
    }

    /// Whether a host is down.
    pub(crate) fn is_down(&self, number: u64) -> bool {
        self.wrong.iter().any(|wrong| matches!(wrong.what, What::Down(down) if down == number))
    }

    /// Goes on: ends what is over, and sometimes begins something.
    pub(crate) fn go_on(&mut self, sim: &mut Sim<'_>, now: Duration) {
        self.end_until(sim, now);
        if now >= self.next {
            self.next = now + Duration::from_millis(1 + self.random.below(self.pause_ms_max));
            self.begin(sim, now);
        }
    }

    /// Ends all that is wrong.
    pub(crate) fn heal(&mut self, sim: &mut Sim<'_>) {
        for host in &self.hosts {
            host.set_wall_clock(0);
        }
        self.end_until(sim, Duration::MAX);
        for host in &self.hosts {
            host.disk.fault(|faults| faults.lose_power_after = None);
            host.disk.fault(|faults| faults.fail_sync_after = None);
        }
    }

    fn end_until(&mut self, sim: &mut Sim<'_>, now: Duration) {
        let (over, wrong) = std::mem::take(&mut self.wrong).into_iter().partition(|wrong| wrong.until <= now);
        self.wrong = wrong;
        let over: Vec<Wrong> = over;
        for Wrong { what, .. } in over {
            match what {
                What::Down(number) => {
                    self.host(number).disk.switch_on();
                    self.relink(sim);
                    trace::note(format_args!("{} starts", name(number)));
                    sim.bounce(name(number));
                }
                What::Cut(_) => {
                    trace::note("a cut is mended");
                    self.relink(sim);
                }
                What::Held(a, b) => {
                    trace::note(format_args!("messages between {a} and {b} go on"));
                    sim.release(a.as_str(), b.as_str());
                }
                What::Slow(links) => {
                    for (a, b) in links {
                        let most = Duration::from_millis(LATENCY_MS_MAX);
                        sim.set_link_max_message_latency(a.as_str(), b.as_str(), most);
                    }
                }
                What::Disk(number) => self.host(number).disk.fault(|faults| {
                    faults.full = false;
                    faults.sync_ms_max = SYNC_MS_MAX;
                }),
            }
        }
    }

    fn begin(&mut self, sim: &mut Sim<'_>, now: Duration) {
        let lasts_ms_max = *self.random.pick(&[300, 2000, 5000]);
        let until = now + Duration::from_millis(50 + self.random.below(lasts_ms_max));
        let number = self.random.pick(&self.hosts).number;
        match self.random.below(100) {
            0..10 => self.take_down_one(sim, number, Death::Killed, until, "kill"),
            10..18 => self.take_down_one(sim, number, Death::PowerLost, until, "power loss"),
            18..22 => self.take_down_all(sim, now),
            22..34 => self.lose_power_at_a_write(number),
            34..44 => self.cut_off(sim, number, until),
            44..52 => self.cut_one_way(sim, number, until),
            52..58 => self.split(sim, until),
            58..64 => self.hold(sim, until),
            64..74 => self.slow_links(sim, until),
            74..82 => self.slow_disk(number, until),
            82..89 => self.fail_a_sync(number),
            89..94 => self.fill_disk(number, until),
            _ => self.jump(number),
        }
    }

    fn fire(&mut self, kind: &'static str, what: impl std::fmt::Display) {
        *self.fired.entry(kind).or_default() += 1;
        trace::note(format_args!("{kind}: {what}"));
    }

    fn host(&self, number: u64) -> &Rc<Host> {
        &self.hosts[number as usize - 1]
    }

    /// Takes a host down until a time.
    pub(crate) fn take_down(&mut self, sim: &mut Sim<'_>, number: u64, death: Death, until: Duration) {
        match death {
            Death::Killed => self.host(number).disk.kill(),
            Death::PowerLost => {
                // Nobody hears that it is gone.
                for other in self.names.iter().filter(|other| **other != name(number)) {
                    sim.partition(name(number), other.as_str());
                    self.cut.insert((name(number), other.clone()), true);
                    self.cut.insert((other.clone(), name(number)), true);
                }
                if !self.host(number).disk.is_off() {
                    self.host(number).disk.lose_power();
                }
            }
        }
        self.host(number).forget();
        sim.crash(name(number));
        self.wrong.push(Wrong { what: What::Down(number), until });
    }

    fn take_down_one(
        &mut self,
        sim: &mut Sim<'_>,
        number: u64,
        death: Death,
        until: Duration,
        kind: &'static str,
    ) {
        if !self.is_down(number) {
            self.fire(kind, name(number));
            self.take_down(sim, number, death, until);
        }
    }

    fn take_down_all(&mut self, sim: &mut Sim<'_>, now: Duration) {
        self.fire("power loss of all", "all hosts");
        for number in 1..=self.hosts.len() as u64 {
            if !self.is_down(number) {
                let until = now + Duration::from_millis(100 + self.random.below(1500));
                self.take_down(sim, number, Death::PowerLost, until);
            }
        }
    }

    fn lose_power_at_a_write(&mut self, number: u64) {
        let after_max = *self.random.pick(&[3, 30, 200]);
        let after = self.random.below(after_max);
        self.fire("power loss at a write", format_args!("{} after {after} more", name(number)));
        self.host(number).disk.fault(|faults| faults.lose_power_after = Some(after));
    }

    fn cut_off(&mut self, sim: &mut Sim<'_>, number: u64, until: Duration) {
        let others = self.others(number);
        let links = others.iter().flat_map(|other| both(&name(number), other)).collect();
        self.fire("cut off", name(number));
        self.cut(sim, links, until);
    }

    fn cut_one_way(&mut self, sim: &mut Sim<'_>, number: u64, until: Duration) {
        let others = self.others(number);
        let (out, one) = (self.random.below(2) == 0, self.random.below(2) == 0);
        let link =
            |other: &String| if out { (name(number), other.clone()) } else { (other.clone(), name(number)) };
        let mut links: Vec<(String, String)> = others.iter().map(link).collect();
        if one {
            links = vec![self.random.pick(&links).clone()];
        }
        let way = if out { "from" } else { "to" };
        self.fire("cut one way", format_args!("{way} {}, {} links", name(number), links.len()));
        self.cut(sim, links, until);
    }

    fn split(&mut self, sim: &mut Sim<'_>, until: Duration) {
        let sides: Vec<bool> = self.names.iter().map(|_| self.random.below(2) == 0).collect();
        let side = |wanted: bool| {
            let names = self.names.iter().zip(&sides);
            names.filter(|(_, side)| **side == wanted).map(|(name, _)| name.clone()).collect::<Vec<_>>()
        };
        let (left, right) = (side(true), side(false));
        let links: Vec<(String, String)> =
            left.iter().flat_map(|a| right.iter().flat_map(|b| both(a, b))).collect();
        self.fire("split", format_args!("{left:?} from {right:?}"));
        self.cut(sim, links, until);
    }

    /// Messages wait, and then arrive all at once.
    fn hold(&mut self, sim: &mut Sim<'_>, until: Duration) {
        let (a, b) = (self.random.pick(&self.names).clone(), self.random.pick(&self.names).clone());
        let meddled = self.cut.values().any(|cut| *cut);
        let held = self.wrong.iter().any(|wrong| matches!(wrong.what, What::Held(..)));
        if a != b && !meddled && !held {
            self.fire("hold", format_args!("{a} and {b}"));
            sim.hold(a.as_str(), b.as_str());
            self.wrong.push(Wrong { what: What::Held(a, b), until });
        }
    }

    fn slow_links(&mut self, sim: &mut Sim<'_>, until: Duration) {
        let most = *self.random.pick(&[20, 100, 600]);
        let mut links = Vec::new();
        for (place, a) in self.names.iter().enumerate() {
            for b in &self.names[place + 1..] {
                if self.random.below(3) == 0 {
                    sim.set_link_max_message_latency(a.as_str(), b.as_str(), Duration::from_millis(most));
                    links.push((a.clone(), b.clone()));
                }
            }
        }
        self.fire("slow links", format_args!("{} links up to {most} ms", links.len()));
        self.wrong.push(Wrong { what: What::Slow(links), until });
    }

    fn slow_disk(&mut self, number: u64, until: Duration) {
        let most = *self.random.pick(&[10, 50, 300]);
        self.fire("slow disk", format_args!("{} up to {most} ms", name(number)));
        self.host(number).disk.fault(|faults| faults.sync_ms_max = most);
        self.wrong.push(Wrong { what: What::Disk(number), until });
    }

    fn fail_a_sync(&mut self, number: u64) {
        let after = self.random.below(30);
        self.fire("failed sync", format_args!("{} after {after} more", name(number)));
        self.host(number).disk.fault(|faults| faults.fail_sync_after = Some(after));
    }

    fn fill_disk(&mut self, number: u64, until: Duration) {
        self.fire("full disk", name(number));
        self.host(number).disk.fault(|faults| faults.full = true);
        self.wrong.push(Wrong { what: What::Disk(number), until });
    }

    fn jump(&mut self, number: u64) {
        let off = self.random.below(2 * JUMP_SECONDS_MAX) as i64 - JUMP_SECONDS_MAX as i64;
        self.fire("clock jump", format_args!("{} is off by {off} s", name(number)));
        self.host(number).set_wall_clock(off);
    }

    fn others(&self, number: u64) -> Vec<String> {
        self.names.iter().filter(|other| **other != name(number)).cloned().collect()
    }

    fn cut(&mut self, sim: &mut Sim<'_>, links: Vec<(String, String)>, until: Duration) {
        // Held messages and cuts of one direction don't go together in turmoil.
        if self.wrong.iter().any(|wrong| matches!(wrong.what, What::Held(..))) {
            return;
        }
        self.wrong.push(Wrong { what: What::Cut(links), until });
        self.relink(sim);
    }

    /// Cuts and mends links, so that exactly those are cut that should be.
    fn relink(&mut self, sim: &mut Sim<'_>) {
        let mut wanted: BTreeMap<(String, String), bool> = BTreeMap::new();
        for wrong in &self.wrong {
            match &wrong.what {
                What::Cut(links) => wanted.extend(links.iter().map(|link| (link.clone(), true))),
                What::Down(number) => {
                    // Whoever lost its power is cut off already; whoever was killed sends nothing.
                    let links = self.cut.iter().filter(|((from, to), cut)| {
                        **cut && (*from == name(*number) || *to == name(*number))
                    });
                    wanted.extend(links.map(|(link, _)| (link.clone(), true)));
                }
                What::Held(..) | What::Slow(_) | What::Disk(_) => {}
            }
        }
        for link in wanted.keys() {
            if self.cut.insert(link.clone(), true) != Some(true) {
                sim.partition_oneway(link.0.as_str(), link.1.as_str());
            }
        }
        for (link, cut) in &mut self.cut {
            if *cut && !wanted.contains_key(link) {
                *cut = false;
                sim.repair_oneway(link.0.as_str(), link.1.as_str());
            }
        }
    }
}

fn both(a: &str, b: &str) -> [(String, String); 2] {
    [(a.to_owned(), b.to_owned()), (b.to_owned(), a.to_owned())]
}
