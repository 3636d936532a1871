//! Tapes: lists of trades, as Binance publishes them or made from a seed.
//!
//! A line is `id,price,quantity,quote quantity,time,buyer is maker,best match`, with or without a header line above the first:
//!
//! ```text
//! 553287559,39432.48000000,0.00026300,10.37074224,1610064000278,True,True
//! ```
//!
//! - Amounts are exact: integers of 10^-8 of their asset. No float is involved anywhere.
//! - Times are milliseconds or, since 2025, microseconds since 1970.
//! - A broken line is named by file, line and column. A tape with broken lines is refused as a whole, unless the caller
//!   says that they are to be skipped.
//! - A trade id that comes twice is always an error: nobody can say which of the two lines is right.

use std::{
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Write},
    path::Path,
};

/// Decimals of all amounts.
pub const DECIMALS: u32 = 8;
/// Smallest units in one whole: 10^8.
pub const UNIT: i128 = 100_000_000;
/// Broken lines that are listed; more are only counted.
pub const BROKEN_LISTED_MAX: usize = 20;
/// The longest line that can make sense. Longer ones are broken, and are not kept in memory.
const LINE_BYTES_MAX: usize = 4096;
/// The names of the columns, as messages use them.
const COLUMNS: [&str; 7] =
    ["trade id", "price", "quantity", "quote quantity", "time", "buyer is maker", "best match"];
/// What a tape looks like, for somebody who has another file.
const WANTED: &str = "A line of a trade file (BTCUSDT-trades-2021-01-08.csv, not aggTrades or klines) is\n\
     id,price,quantity,quote quantity,time,buyer is maker,best match:\n\
     553287559,39432.48000000,0.00026300,10.37074224,1610064000278,True,True";
/// Assets that trades are priced in; the longest one that fits ends a symbol.
const QUOTE_ASSETS: [&str; 30] = [
    "FDUSD", "USDT", "USDC", "BUSD", "TUSD", "USDP", "USDS", "BIDR", "IDRT", "BVND", "BKRW", "DOGE", "BTC",
    "ETH", "BNB", "TRX", "XRP", "DOT", "SOL", "DAI", "PAX", "VAI", "EUR", "GBP", "AUD", "TRY", "BRL", "RUB",
    "UAH", "USD",
];
/// Milliseconds of 2001-09-09 and of 2286-11-20: times outside are taken for mistakes.
const TIME_MS_RANGE: std::ops::Range<u64> = 1_000_000_000_000..10_000_000_000_000;

/// A pair of assets: what is traded, and what it is priced in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// What is traded, for example `BTC`.
    pub base: String,
    /// What it is priced in, for example `USDT`.
    pub quote: String,
}

impl Symbol {
    /// Reads `BASE-QUOTE`.
    pub fn parse(text: &str) -> Result<Symbol, String> {
        let good = |asset: &str| {
            (1..=16).contains(&asset.len()) && asset.bytes().all(|byte| byte.is_ascii_alphanumeric())
        };
        match text.split_once(['-', '/']) {
            Some((base, quote)) if good(base) && good(quote) && !base.eq_ignore_ascii_case(quote) => {
                Ok(Symbol { base: base.to_ascii_uppercase(), quote: quote.to_ascii_uppercase() })
            }
            Some(_) | None => {
                Err(format!("{text:?} is no symbol: write two assets with a dash between, like BTC-USDT"))
            }
        }
    }

    /// Takes the symbol from a file's name: `BTCUSDT-trades-2021-01-08.csv` is BTC-USDT.
    pub fn from_file_name(path: &Path) -> Result<Symbol, String> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let pair: String = name.chars().take_while(char::is_ascii_alphanumeric).collect();
        let pair = pair.to_ascii_uppercase();
        let quotes = QUOTE_ASSETS.iter().filter(|quote| pair.len() > quote.len() && pair.ends_with(**quote));
        match quotes.max_by_key(|quote| quote.len()) {
            Some(quote) => Symbol::parse(&format!("{}-{quote}", &pair[..pair.len() - quote.len()])),
            None => {
                Err(format!("can't tell the two assets from the file name {name:?}: use --symbol BASE-QUOTE"))
            }
        }
    }
}

impl fmt::Display for Symbol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.base, self.quote)
    }
}

/// One trade.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trade {
    /// Its id, unique within a symbol.
    pub id: u64,
    /// Smallest units of the quote asset for one whole of the base asset.
    pub price: i128,
    /// Smallest units of the base asset.
    pub quantity: i128,
    /// Smallest units of the quote asset.
    pub quote: i128,
    /// Microseconds since 1970.
    pub time_us: u64,
    /// Whether the buyer's order was there first.
    pub buyer_is_maker: bool,
    /// Whether it was at the best price.
    pub best_match: bool,
}

/// A list of trades of one symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tape {
    /// Where it came from, for people.
    pub name: String,
    /// The symbol.
    pub symbol: Symbol,
    /// The trades, in the order of the tape.
    pub trades: Vec<Trade>,
    /// Broken lines that were skipped.
    pub skipped: u64,
}

/// How to read a tape.
#[derive(Clone, Debug, Default)]
pub struct ReadOptions {
    /// The symbol; if none, it is taken from the file's name.
    pub symbol: Option<Symbol>,
    /// Skip broken lines, instead of refusing the tape.
    pub skip_broken: bool,
    /// Stop after so many trades.
    pub trades_max: Option<usize>,
}

/// Why a tape can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TapeError {
    /// The file can't be read.
    #[error("{file}: {error}")]
    Io {
        /// The file.
        file: String,
        /// What the system said.
        error: io::Error,
    },
    /// The symbol is not known.
    #[error("{0}")]
    Symbol(String),
    /// Lines are broken.
    #[error("{}", list_broken(lines, *count))]
    Broken {
        /// The first of them, up to [`BROKEN_LISTED_MAX`].
        lines: Vec<BrokenLine>,
        /// How many there are.
        count: u64,
    },
    /// A trade comes twice.
    #[error(
        "{file}: trade {id} stands in line {first} and again in line {second}: a tape names each trade once"
    )]
    Duplicate {
        /// The file.
        file: String,
        /// The trade.
        id: u64,
        /// The line where it stands first.
        first: u64,
        /// The line where it stands again.
        second: u64,
    },
    /// There is nothing to settle.
    #[error("{file}: there is no trade in it")]
    Empty {
        /// The file.
        file: String,
    },
    /// The file is something else.
    #[error("{file} is no list of trades: {problem}")]
    NoTape {
        /// The file.
        file: String,
        /// What it is instead, and what to do.
        problem: String,
    },
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BrokenLine {
    /// The file.
    pub file: String,
    /// The line, from 1.
    pub line: u64,
    /// The column, from 1; none if the whole line is meant.
    pub column: Option<usize>,
    /// What is wrong.
    pub problem: String,
}

impl fmt::Display for BrokenLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: line {}", self.file, self.line)?;
        if let Some(column) = self.column {
            write!(f, ", column {column} ({})", COLUMNS[column - 1])?;
        }
        write!(f, ": {}", self.problem)
    }
}

fn list_broken(lines: &[BrokenLine], count: u64) -> String {
    let mut text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    if count > lines.len() as u64 {
        text += &format!("... and {} more broken lines\n", count - lines.len() as u64);
    }
    text + "nothing was settled; --skip-broken leaves broken lines out"
}

impl Tape {
    /// Reads a file.
    pub fn read(path: &Path, options: &ReadOptions) -> Result<Tape, TapeError> {
        let name = path.display().to_string();
        let failed = |error| TapeError::Io { file: name.clone(), error };
        let mut input = BufReader::with_capacity(1 << 16, File::open(path).map_err(failed)?);
        // What it is comes before how it is called.
        let beginning = input.fill_buf().map_err(failed)?;
        if let Some(problem) = something_else(beginning) {
            return Err(TapeError::NoTape { file: name, problem });
        }
        let symbol = match &options.symbol {
            Some(symbol) => symbol.clone(),
            None => Symbol::from_file_name(path).map_err(TapeError::Symbol)?,
        };
        Tape::read_from(&name, symbol, input, options)
    }

    /// Reads lines from anywhere; `name` is what errors call it.
    pub fn read_from(
        name: &str,
        symbol: Symbol,
        mut input: impl BufRead,
        options: &ReadOptions,
    ) -> Result<Tape, TapeError> {
        let trades_max = options.trades_max.unwrap_or(usize::MAX);
        let (mut trades, mut places, mut broken, mut broken_count) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let mut text = Vec::new();
        for line in 1_u64.. {
            if trades.len() >= trades_max {
                break;
            }
            let more = next_line(&mut input, &mut text)
                .map_err(|error| TapeError::Io { file: name.to_owned(), error })?;
            if !more {
                break;
            }
            if text.is_empty() || (line == 1 && is_header(&text)) {
                continue;
            }
            match parse_line(&text) {
                Ok(trade) => {
                    places.push((trade.id, line));
                    trades.push(trade);
                }
                Err((column, problem)) => {
                    broken_count += 1;
                    if broken.len() < BROKEN_LISTED_MAX {
                        broken.push(BrokenLine { file: name.to_owned(), line, column, problem });
                    }
                }
            }
        }
        // Not one good line: then the lines are not what is broken.
        if trades.is_empty()
            && let Some(first) = broken.first()
        {
            let problem = format!("no line is a trade ({first}).\n{WANTED}");
            return Err(TapeError::NoTape { file: name.to_owned(), problem });
        }
        if broken_count > 0 && !options.skip_broken {
            return Err(TapeError::Broken { lines: broken, count: broken_count });
        }
        check_unique(name, places)?;
        if trades.is_empty() {
            return Err(TapeError::Empty { file: name.to_owned() });
        }
        Ok(Tape { name: name.to_owned(), symbol, trades, skipped: broken_count })
    }

    /// Makes a tape of its own: a random walk of prices in steps of 0.01 and quantities in steps of 0.000001. The same seed
    /// makes the same tape, and a longer tape begins with the shorter one.
    pub fn generate(seed: u64, count: usize) -> Tape {
        const TICK: i128 = UNIT / 100;
        const STEP: i128 = UNIT / 1_000_000;
        let mut random = Random(seed);
        let mut price_ticks: i128 = 4_000_000;
        let mut time_us: u64 = 1_610_064_000_000_000;
        // Tapes of different seeds are of different trades.
        let first = 1 + (mix(seed) % 1_000_000) * 1_000_000_000;
        let mut trades = Vec::with_capacity(count);
        for id in (first..).take(count) {
            let move_ticks = random.below(401) as i128 - 200;
            price_ticks = (price_ticks + move_ticks).clamp(1_000_000, 10_000_000);
            // Small trades are common, large ones rare: 0.000100 to about 1.6.
            let size = 100_u64 << random.below(14);
            let quantity = i128::from(size + random.below(size)) * STEP;
            let price = price_ticks * TICK;
            time_us += 1_000 * (1 + random.below(80));
            let (buyer_is_maker, best_match) = (random.below(2) == 0, true);
            // Exact: a tick times a step is one smallest unit.
            let quote = price * quantity / UNIT;
            trades.push(Trade { id, price, quantity, quote, time_us, buyer_is_maker, best_match });
        }
        let symbol = Symbol { base: "BTC".into(), quote: "USDT".into() };
        Tape { name: format!("generated from seed {seed}"), symbol, trades, skipped: 0 }
    }

    /// Writes the tape as Binance would.
    pub fn write_csv(&self, output: &mut impl Write) -> io::Result<()> {
        let word = |flag: bool| if flag { "True" } else { "False" };
        for trade in &self.trades {
            let (price, quantity) = (fixed_text(trade.price), fixed_text(trade.quantity));
            // Whole milliseconds are written as such; what is finer needs the newer form.
            let time = if trade.time_us % 1000 == 0 { trade.time_us / 1000 } else { trade.time_us };
            let (maker, best) = (word(trade.buyer_is_maker), word(trade.best_match));
            writeln!(
                output,
                "{},{price},{quantity},{},{time},{maker},{best}",
                trade.id,
                fixed_text(trade.quote)
            )?;
        }
        Ok(())
    }
}

/// Reads a line without its end into `text`; false at the end of the input. Of a line that is too long only the beginning is
/// kept, enough to see that it is.
fn next_line(input: &mut impl BufRead, text: &mut Vec<u8>) -> io::Result<bool> {
    text.clear();
    let mut any = false;
    loop {
        let available = input.fill_buf()?;
        if available.is_empty() {
            break;
        }
        any = true;
        let end = available.iter().position(|byte| *byte == b'\n');
        let piece = &available[..end.unwrap_or(available.len())];
        let room = (LINE_BYTES_MAX + 1).saturating_sub(text.len());
        text.extend_from_slice(&piece[..piece.len().min(room)]);
        let used = piece.len() + usize::from(end.is_some());
        input.consume(used);
        if end.is_some() {
            break;
        }
    }
    if text.last() == Some(&b'\r') {
        text.pop();
    }
    Ok(any)
}

/// What a file is that is no text, by its first bytes.
fn something_else(beginning: &[u8]) -> Option<String> {
    if beginning.starts_with(b"PK\x03\x04") {
        Some("it is a zip archive; unpack it (`unzip FILE`), and give the .csv that is in it".into())
    } else if beginning.starts_with(b"\x1f\x8b") {
        Some("it is compressed by gzip; unpack it (`gunzip FILE`), and give the .csv".into())
    } else if beginning.contains(&0) {
        Some(format!("it is no text.\n{WANTED}"))
    } else {
        None
    }
}

/// A first line without any number is a header.
fn is_header(text: &[u8]) -> bool {
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
    text.contains(&b',')
        && text.is_ascii()
        && text.split(|byte| *byte == b',').all(|column| {
            column.iter().any(u8::is_ascii_alphabetic) && !column.iter().any(u8::is_ascii_digit)
        })
}

type Problem = (Option<usize>, String);

fn parse_line(text: &[u8]) -> Result<Trade, Problem> {
    if text.len() > LINE_BYTES_MAX {
        return Err((None, format!("is longer than {LINE_BYTES_MAX} bytes")));
    }
    let text = std::str::from_utf8(text).map_err(|_| (None, "is not text (UTF-8)".to_owned()))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let columns: Vec<&str> = text.split(',').map(str::trim).collect();
    let &[id, price, quantity, quote, time, maker, best] = columns.as_slice() else {
        return Err((None, format!("has {} columns instead of {}", columns.len(), COLUMNS.len())));
    };
    let at = |column: usize| move |problem: String| (Some(column), problem);
    let trade = Trade {
        id: parse_id(id).map_err(at(1))?,
        price: parse_positive(price).map_err(at(2))?,
        quantity: parse_positive(quantity).map_err(at(3))?,
        quote: parse_positive(quote).map_err(at(4))?,
        time_us: parse_time(time).map_err(at(5))?,
        buyer_is_maker: parse_bool(maker).map_err(at(6))?,
        best_match: parse_bool(best).map_err(at(7))?,
    };
    check_quote(&trade).map_err(at(4))?;
    Ok(trade)
}

fn parse_id(text: &str) -> Result<u64, String> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let id = if digits { text.parse().ok() } else { None };
    id.ok_or_else(|| format!("{} is no trade id", shown(text)))
}

fn parse_positive(text: &str) -> Result<i128, String> {
    match parse_amount(text)? {
        0 => Err(format!("{} must be above 0", shown(text))),
        amount => Ok(amount),
    }
}

fn parse_time(text: &str) -> Result<u64, String> {
    let number = parse_id(text).map_err(|_| format!("{} is no time", shown(text)))?;
    if TIME_MS_RANGE.contains(&number) {
        return Ok(number * 1000);
    }
    if TIME_MS_RANGE.contains(&(number / 1000)) {
        return Ok(number);
    }
    Err(format!("{} is no time in milliseconds or microseconds since 1970", shown(text)))
}

fn parse_bool(text: &str) -> Result<bool, String> {
    if text.eq_ignore_ascii_case("true") {
        Ok(true)
    } else if text.eq_ignore_ascii_case("false") {
        Ok(false)
    } else {
        Err(format!("{} is neither true nor false", shown(text)))
    }
}

/// The quote quantity is what is paid, so it is taken from the tape. It must be price times quantity up to a ten-thousandth
/// (and a smallest unit): that finds columns that slipped and digits that were lost, and forgives any way of rounding.
fn check_quote(trade: &Trade) -> Result<(), String> {
    let Some(product) = trade.price.checked_mul(trade.quantity) else {
        return Err("price times quantity is beyond 128 bits".into());
    };
    let expected = product / UNIT;
    if (trade.quote - expected).abs() > expected / 10_000 + 1 {
        let (quote, expected) = (amount_text(trade.quote), amount_text(expected));
        return Err(format!("{quote} is not price times quantity, which is {expected}"));
    }
    Ok(())
}

fn check_unique(file: &str, mut places: Vec<(u64, u64)>) -> Result<(), TapeError> {
    places.sort_unstable();
    let twice = places.windows(2).find(|pair| pair[0].0 == pair[1].0);
    match twice {
        None => Ok(()),
        Some(pair) => {
            let (id, first, second) = (pair[0].0, pair[0].1, pair[1].1);
            Err(TapeError::Duplicate { file: file.to_owned(), id, first, second })
        }
    }
}

/// Reads an amount without a sign, exactly: at most 8 decimals that aren't 0.
pub fn parse_amount(text: &str) -> Result<i128, String> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return Err(format!("{} is no amount", shown(text)));
    }
    let (kept, beyond) = fraction.split_at(fraction.len().min(DECIMALS as usize));
    if beyond.bytes().any(|byte| byte != b'0') {
        return Err(format!("{} has more than {DECIMALS} decimals", shown(text)));
    }
    let too_large = || format!("{} is too large", shown(text));
    let mut amount: i128 = 0;
    for digit in whole.bytes().chain(kept.bytes()) {
        let grown = amount.checked_mul(10).and_then(|ten| ten.checked_add(i128::from(digit - b'0')));
        amount = grown.ok_or_else(too_large)?;
    }
    amount.checked_mul(10_i128.pow(DECIMALS - kept.len() as u32)).ok_or_else(too_large)
}

/// An amount in wholes with all 8 decimals.
pub fn fixed_text(amount: i128) -> String {
    let (sign, size) = (if amount < 0 { "-" } else { "" }, amount.unsigned_abs());
    let unit = UNIT.unsigned_abs();
    format!("{sign}{}.{:08}", size / unit, size % unit)
}

/// An amount in wholes, without zeros at its end.
pub fn amount_text(amount: i128) -> String {
    fixed_text(amount).trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A text as messages show it: quoted, and not too long.
fn shown(text: &str) -> String {
    if text.chars().count() > 40 {
        format!("{:?}...", text.chars().take(40).collect::<String>())
    } else {
        format!("{text:?}")
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): a fixed hash of 64 bits. Users are derived with it, so it never changes.
pub fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Random numbers that are the same for the same seed everywhere.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// A number from 0 to `bound` - 1. The bound must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A number from 0 to 1, without 1.
    pub fn unit(&mut self) -> f64 {
        // As many bits as fit into an f64 exactly.
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(mix(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "553287559,39432.48000000,0.00026300,10.37074224,1610064000278,True,True";

    fn read(text: &str) -> Result<Tape, TapeError> {
        read_with(text.as_bytes(), &ReadOptions::default())
    }

    fn read_with(text: &[u8], options: &ReadOptions) -> Result<Tape, TapeError> {
        Tape::read_from("t.csv", Symbol::parse("BTC-USDT").unwrap(), text, options)
    }

    fn problem(line: &str) -> String {
        match read(&format!("{GOOD}\n{line}\n")) {
            Err(TapeError::Broken { lines, .. }) => lines[0].to_string(),
            other => panic!("{line:?} was taken: {other:?}"),
        }
    }

    #[test]
    fn a_line_is_read_exactly() {
        let tape = read(GOOD).unwrap();
        let trade = Trade {
            id: 553287559,
            price: 3_943_248_000_000,
            quantity: 26_300,
            quote: 1_037_074_224,
            time_us: 1_610_064_000_278_000,
            buyer_is_maker: true,
            best_match: true,
        };
        assert_eq!(tape.trades, [trade]);
    }

    #[test]
    fn headers_carriage_returns_empty_lines_microseconds_and_any_case_are_taken() {
        let header = "\u{feff}id,price,qty,quote_qty,time,is_buyer_maker,is_best_match\r\n";
        let newer = "7,39432.48,0.000263,10.37074224,1610064000278001,true,FALSE";
        let tape = read(&format!("{header}{GOOD}\r\n\r\n{newer}")).unwrap();
        assert_eq!(tape.trades.len(), 2);
        assert_eq!(tape.trades[1].time_us, 1_610_064_000_278_001);
        assert_eq!((tape.trades[1].buyer_is_maker, tape.trades[1].best_match), (true, false));
    }

    #[test]
    fn a_broken_line_is_named_with_its_column() {
        for (line, expected) in [
            ("x,1,1,1,1610064000278,True,True", "t.csv: line 2, column 1 (trade id): \"x\" is no trade id"),
            ("1,1e5,1,1,1610064000278,True,True", "t.csv: line 2, column 2 (price): \"1e5\" is no amount"),
            ("1,1,-1,1,1610064000278,True,True", "t.csv: line 2, column 3 (quantity): \"-1\" is no amount"),
            (
                "1,1,0.0,1,1610064000278,True,True",
                "t.csv: line 2, column 3 (quantity): \"0.0\" must be above 0",
            ),
            (
                "1,1,1,1.000000001,1610064000278,True,True",
                "t.csv: line 2, column 4 (quote quantity): \"1.000000001\" has more than 8 decimals",
            ),
            (
                "1,2,3,7,1610064000278,True,True",
                "t.csv: line 2, column 4 (quote quantity): 7 is not price times quantity, which is 6",
            ),
            (
                "1,1,1,1,77,True,True",
                "t.csv: line 2, column 5 (time): \"77\" is no time in milliseconds or microseconds since 1970",
            ),
            (
                "1,1,1,1,1610064000278,yes,True",
                "t.csv: line 2, column 6 (buyer is maker): \"yes\" is neither true nor false",
            ),
            ("1,1,1,1,1610064000278,True", "t.csv: line 2: has 6 columns instead of 7"),
            (
                "\"1,1,1,1,1610064000278,True,True",
                "t.csv: line 2, column 1 (trade id): \"\\\"1\" is no trade id",
            ),
        ] {
            assert_eq!(problem(line), expected);
        }
    }

    #[test]
    fn a_broken_first_line_is_not_taken_for_a_header() {
        let error = read(&format!("x53287559,39432.48,0.000263,10.37074224,1610064000278,True,True\n{GOOD}"));
        let Err(TapeError::Broken { lines, count }) = error else { panic!("{error:?}") };
        assert_eq!((lines[0].line, lines[0].column, count), (1, Some(1), 1));
    }

    #[test]
    fn amounts_beyond_the_range_are_refused_never_wrapped() {
        let largest = "1701411834604692317316873037158.84105727";
        assert_eq!(parse_amount(largest), Ok(i128::MAX));
        assert_eq!(fixed_text(i128::MAX), largest);
        assert!(parse_amount("1701411834604692317316873037158.84105728").is_err());
        assert!(parse_amount(&"9".repeat(60)).is_err());
        let line = format!("1,{},{},1,1610064000278,True,True", "9".repeat(30), "9".repeat(30));
        assert!(problem(&line).contains("beyond 128 bits"));
        for text in ["", ".", "1.", ".5", "+1", "1.2.3", "1 2", "١"] {
            assert!(parse_amount(text).is_err(), "{text:?} was taken");
        }
        assert_eq!(parse_amount("0.100000000000"), Ok(UNIT / 10));
    }

    #[test]
    fn all_broken_lines_stop_the_tape_up_to_twenty_listed_unless_skipped() {
        let text = format!("{GOOD}\n{}", "broken\n".repeat(30));
        let error = read(&text).unwrap_err();
        let TapeError::Broken { lines, count } = &error else { panic!("{error}") };
        assert_eq!((lines.len(), *count), (BROKEN_LISTED_MAX, 30));
        assert!(error.to_string().contains("and 10 more"));
        let options = ReadOptions { skip_broken: true, ..ReadOptions::default() };
        let tape = read_with(text.as_bytes(), &options).unwrap();
        assert_eq!((tape.trades.len(), tape.skipped), (1, 30));
    }

    #[test]
    fn bytes_that_are_no_text_and_endless_lines_are_broken_lines() {
        let mut text = GOOD.as_bytes().to_vec();
        text.extend(b"\n\xff\xfe\n");
        text.extend(vec![b'1'; 1 << 20]);
        let Err(TapeError::Broken { lines, .. }) = read_with(&text, &ReadOptions::default()) else {
            panic!("garbage was taken")
        };
        assert_eq!(lines[0].problem, "is not text (UTF-8)");
        assert_eq!(lines[1].problem, "is longer than 4096 bytes");
    }

    #[test]
    fn a_trade_that_comes_twice_is_named_with_both_lines_even_if_broken_ones_are_skipped() {
        let text = format!("{GOOD}\nbroken\n{GOOD}\n");
        let options = ReadOptions { skip_broken: true, ..ReadOptions::default() };
        let error = read_with(text.as_bytes(), &options).unwrap_err().to_string();
        assert!(error.contains("trade 553287559 stands in line 1 and again in line 3"), "{error}");
    }

    #[test]
    fn another_file_is_told_as_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let told = |name: &str, contents: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, contents).unwrap();
            Tape::read(&path, &ReadOptions::default()).unwrap_err().to_string()
        };
        let zip = told("BTCUSDT-trades-2021-01-08.zip", b"PK\x03\x04\x14\0\0\0");
        assert!(zip.contains("is a zip archive; unpack it"), "{zip}");
        assert!(told("tape.csv.gz", b"\x1f\x8b\x08\0").contains("gzip"), "what it is comes before its name");
        assert!(told("BTCUSDT.csv", b"\x7fELF\x02\x01\x01\0\0").contains("it is no text"));
        let klines = "1610064000000,39432.48,39432.49,39400.01,39410.22,12.5,1610064059999,492000.1,700,6.1,240000.0,0\n";
        let klines = told("BTCUSDT-1m-2021-01.csv", klines.repeat(30).as_bytes());
        assert!(klines.contains("no line is a trade") && klines.contains("has 12 columns"), "{klines}");
        assert!(klines.lines().count() == 4 && !klines.contains("--skip-broken"), "{klines}");
        let nowhere = Tape::read(Path::new("/nowhere/tape.csv"), &ReadOptions::default()).unwrap_err();
        assert!(nowhere.to_string().starts_with("/nowhere/tape.csv: No such file"), "{nowhere}");
        let folder = Tape::read(folder.path(), &ReadOptions::default()).unwrap_err();
        assert!(folder.to_string().contains("Is a directory"), "{folder}");
    }

    #[test]
    fn symbols_come_from_file_names() {
        let of = |name: &str| Symbol::from_file_name(Path::new(name)).map(|symbol| symbol.to_string());
        assert_eq!(of("/x/BTCUSDT-trades-2021-01-08.csv").as_deref(), Ok("BTC-USDT"));
        assert_eq!(of("ethbtc-trades.csv").as_deref(), Ok("ETH-BTC"));
        assert_eq!(of("BTCFDUSD-trades.csv").as_deref(), Ok("BTC-FDUSD"));
        assert_eq!(of("1000SATSUSDT-trades.csv").as_deref(), Ok("1000SATS-USDT"));
        assert!(of("tape.csv").is_err());
        assert!(Symbol::parse("BTC-BTC").is_err());
    }

    #[test]
    fn a_generated_tape_is_the_same_for_its_seed_and_survives_being_written_and_read() {
        let tape = Tape::generate(7, 3000);
        assert_eq!(tape.trades[..1000], Tape::generate(7, 1000).trades);
        assert_ne!(tape.trades[0].id, Tape::generate(8, 1).trades[0].id);
        let mut text = Vec::new();
        tape.write_csv(&mut text).unwrap();
        let read = read_with(&text, &ReadOptions::default()).unwrap();
        assert_eq!(read.trades, tape.trades);
    }
}
