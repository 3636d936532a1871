//! One picture of all: bars for the throughput, and for each case a line from the median latency to the 99th percentile.
//!
//! The throughput's scale is linear, so that lengths can be compared; the latency's is logarithmic. The file needs nothing
//! else: no style sheet, no script, no font.

use std::fmt::Write as _;

use super::number;
use crate::{
    plan::System,
    results::{Results, Row},
};

const WIDTH: f64 = 960.0;
const LINE: f64 = 20.0;
const HEAD: f64 = 58.0;
const GROUP: f64 = 26.0;
const FOOT: f64 = 34.0;
/// Where the bars begin and end, and the latencies.
const BARS: (f64, f64) = (270.0, 560.0);
const LATENCIES: (f64, f64) = (660.0, 930.0);

/// The picture.
pub fn svg(results: &Results) -> String {
    let groups = [("Uniform accounts", false), ("A hot account in every trade", true)];
    let rows = |is_hot: bool| {
        results.cases.iter().filter(move |row| row.case.is_hot == is_hot && !row.rounds.is_empty())
    };
    let lines = results.cases.iter().filter(|row| !row.rounds.is_empty()).count() as f64;
    let height = HEAD + lines * LINE + 2.0 * GROUP + FOOT;
    let scale = Scale::of(results);
    let mut svg = String::new();
    // Writing to a string can't fail.
    let _ = write!(
        svg,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\" role=\"img\" aria-label=\"Throughput and latency of Verdict and its peers\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    text(&mut svg, 16.0, 24.0, "start", "#111111", "Settled trades: throughput and latency");
    text(&mut svg, BARS.0, 46.0, "start", "#444444", "trades a second (median of the rounds)");
    text(&mut svg, LATENCIES.0, 46.0, "start", "#444444", "p50 to p99, milliseconds");
    scale.write_grid(&mut svg, height - FOOT);
    let mut y = HEAD;
    for (title, is_hot) in groups {
        if rows(is_hot).next().is_none() {
            continue;
        }
        text(&mut svg, 16.0, y + 18.0, "start", "#111111", title);
        y += GROUP;
        for row in rows(is_hot) {
            scale.write_row(&mut svg, row, y);
            y += LINE;
        }
    }
    let about = format!("{}, {}: {}", results.date, results.machine, results.versions.join(", "));
    text(&mut svg, 16.0, height - 10.0, "start", "#666666", &about);
    svg + "</svg>\n"
}

struct Scale {
    rate_max: f64,
    latency_min: f64,
    latency_max: f64,
}

impl Scale {
    fn of(results: &Results) -> Scale {
        let figures = || results.cases.iter().flat_map(|row| &row.rounds);
        let greatest = |numbers: &mut dyn Iterator<Item = f64>| numbers.fold(0.001, f64::max);
        let least = figures().map(|figures| figures.p50_ms).fold(1000.0, f64::min).max(0.001);
        let latency_min = 10_f64.powf(least.log10().floor());
        let latency_max = greatest(&mut figures().map(|figures| figures.p99_ms));
        Scale {
            rate_max: greatest(&mut figures().map(|figures| figures.trades_per_second)),
            latency_min,
            latency_max: 10_f64.powf(latency_max.log10().ceil()).max(latency_min * 10.0),
        }
    }

    fn latency_x(&self, milliseconds: f64) -> f64 {
        let part = (milliseconds / self.latency_min).log10() / (self.latency_max / self.latency_min).log10();
        LATENCIES.0 + (LATENCIES.1 - LATENCIES.0) * part.clamp(0.0, 1.0)
    }

    fn write_grid(&self, svg: &mut String, bottom: f64) {
        let decades = (self.latency_max / self.latency_min).log10().round() as i32;
        for decade in 0..=decades {
            let value = self.latency_min * 10_f64.powi(decade);
            let x = self.latency_x(value);
            let _ = writeln!(
                svg,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{HEAD}\" y2=\"{bottom:.1}\" stroke=\"#dddddd\"/>"
            );
            let label = if value < 1.0 { value.to_string() } else { super::grouped(value.round() as u64) };
            text(svg, x, bottom + 13.0, "middle", "#666666", &label);
        }
    }

    fn write_row(&self, svg: &mut String, row: &Row, y: f64) {
        let colour = colour(row.system);
        let clients = row.case.clients_text();
        text(svg, BARS.0 - 8.0, y + 14.0, "end", "#111111", &format!("{}, {clients}", row.system));
        let rate = row.median(|figures| figures.trades_per_second);
        let length = ((BARS.1 - BARS.0) * rate / self.rate_max).max(1.0);
        let _ = writeln!(
            svg,
            "<rect x=\"{}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"{}\" fill=\"{colour}\"/>",
            BARS.0,
            y + 3.0,
            LINE - 6.0
        );
        text(svg, BARS.0 + length + 5.0, y + 14.0, "start", "#111111", &number(rate));
        let ends = [row.median(|figures| figures.p50_ms), row.median(|figures| figures.p99_ms)];
        let [from, to] = ends.map(|latency| self.latency_x(latency));
        let middle = y + LINE / 2.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"{colour}\" stroke-width=\"3\"/>\
             <circle cx=\"{from:.1}\" cy=\"{middle:.1}\" r=\"4\" fill=\"{colour}\"><title>p50 {} ms, p99 {} ms</title></circle>",
            number(ends[0]),
            number(ends[1])
        );
    }
}

fn colour(system: System) -> &'static str {
    match system {
        System::Verdict => "#0b6e4f",
        System::Postgres => "#336791",
        System::PostgresStandby => "#7a9cbf",
        System::Etcd => "#c97b2a",
    }
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, colour: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::example;

    #[test]
    fn every_case_has_its_bar_inside_the_picture() {
        let results = example();
        let svg = svg(&results);
        // One for the background.
        assert_eq!(svg.matches("<rect ").count(), results.cases.len() + 1);
        assert_eq!(svg.matches("<circle ").count(), results.cases.len());
        let widths =
            svg.split("width=\"").skip(3).filter_map(|rest| rest.split('"').next()?.parse::<f64>().ok());
        assert!(widths.clone().count() >= results.cases.len());
        assert!(widths.into_iter().all(|width| width <= BARS.1 - BARS.0 + 0.1), "{svg}");
        assert!(svg.contains("etcd &lt;3&gt;") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn a_latency_of_none_is_at_the_left_end() {
        let scale = Scale { rate_max: 1.0, latency_min: 0.1, latency_max: 100.0 };
        assert_eq!(scale.latency_x(0.0), LATENCIES.0);
        assert_eq!(scale.latency_x(1000.0), LATENCIES.1);
    }
}
