//! Bars side by side as SVG, for reports that compare. Colours come from the page's style sheet.

use std::fmt::Write as _;

use super::{
    escape,
    plot::{number, round_up},
};

/// The size of the picture in its own units; the page scales it. Its height grows with the bars.
const WIDTH: f64 = 960.0;
const ROW: f64 = 26.0;
const TOP: f64 = 6.0;
const BOTTOM: f64 = 22.0;
/// The room for the names on the left, and for the figures on the right.
const LEFT: f64 = 130.0;
const RIGHT: f64 = 120.0;

/// One bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Its name.
    pub name: String,
    /// How long its parts are, one after the other, each with its class in the style sheet.
    pub parts: Vec<(f64, &'static str)>,
    /// From where to where the whole was seen, if it was seen several times.
    pub range: Option<(f64, f64)>,
    /// What to write at its end.
    pub label: String,
}

/// Bars with one scale.
#[derive(Clone, Debug)]
pub struct Bars {
    /// What they show, for those who can't see it.
    pub title: String,
    /// The unit of the scale.
    pub unit: &'static str,
    /// The bars, from top to bottom.
    pub bars: Vec<Bar>,
}

impl Bars {
    /// The SVG element.
    pub fn svg(&self) -> String {
        let floor = TOP + ROW * self.bars.len() as f64;
        let (height, title) = (floor + BOTTOM, escape(&self.title));
        let mut svg = String::new();
        // Writing to a string can't fail.
        let _ = write!(
            svg,
            "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\" class=\"plot\">"
        );
        let high = self.high();
        for part in 0..=4 {
            let value = high * f64::from(part) / 4.0;
            let x = self.x(value);
            let unit = if part == 4 { format!(" {}", self.unit) } else { String::new() };
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{floor:.1}\"/>\
                 <text class=\"scale\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}{}</text>",
                floor + 15.0,
                number(value),
                escape(&unit)
            );
        }
        for (place, bar) in self.bars.iter().enumerate() {
            self.write_bar(&mut svg, TOP + ROW * place as f64, bar);
        }
        svg + "</svg>"
    }

    fn write_bar(&self, svg: &mut String, top: f64, bar: &Bar) {
        let middle = top + ROW / 2.0;
        let _ = write!(
            svg,
            "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            middle + 4.0,
            escape(&bar.name)
        );
        let mut from = 0.0;
        for (length, class) in &bar.parts {
            let (left, right) = (self.x(from), self.x(from + length));
            let _ = write!(
                svg,
                "<rect class=\"{class} bar\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\"/>",
                top + 4.0,
                (right - left).max(0.0),
                ROW - 8.0
            );
            from += length;
        }
        if let Some((low, high)) = bar.range {
            let (left, right) = (self.x(low), self.x(high));
            let _ = write!(
                svg,
                "<line class=\"range\" x1=\"{left:.1}\" x2=\"{right:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\"/>"
            );
        }
        let end = bar.range.map_or(from, |(_, high)| high.max(from));
        let _ = write!(
            svg,
            "<text class=\"scale\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            self.x(end) + 6.0,
            middle + 4.0,
            escape(&bar.label)
        );
    }

    fn high(&self) -> f64 {
        let whole = |bar: &Bar| bar.parts.iter().map(|(length, _)| length).sum::<f64>();
        let ends = self.bars.iter().map(|bar| whole(bar).max(bar.range.map_or(0.0, |(_, high)| high)));
        let high = ends.filter(|end| end.is_finite()).fold(0.0, f64::max);
        if high > 0.0 { round_up(high) } else { 1.0 }
    }

    fn x(&self, value: f64) -> f64 {
        let share = if value.is_finite() { (value / self.high()).clamp(0.0, 1.0) } else { 0.0 };
        LEFT + (WIDTH - LEFT - RIGHT) * share
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(length: f64, range: Option<(f64, f64)>) -> Bar {
        Bar {
            name: "a & b".into(),
            parts: vec![(length / 2.0, "one"), (length / 2.0, "two")],
            range,
            label: "x".into(),
        }
    }

    #[test]
    fn bars_stay_inside_the_picture_and_are_as_long_as_their_figures() {
        let bars = vec![bar(10.0, Some((8.0, 15.0))), bar(20.0, None), bar(0.0, None), bar(f64::NAN, None)];
        let bars = Bars { title: "T".into(), unit: "us", bars };
        let svg = bars.svg();
        for coordinate in svg.split(['"', ' ', ',']).filter_map(|text| text.parse::<f64>().ok()) {
            assert!((0.0..=WIDTH).contains(&coordinate), "{coordinate} in {svg}");
        }
        assert!(!svg.contains("NaN") && svg.contains("a &amp; b"), "{svg}");
        assert_eq!((svg.matches("<rect").count(), svg.matches("class=\"range\"").count()), (8, 1));
        assert!((bars.x(20.0) - bars.x(10.0) - (bars.x(10.0) - bars.x(0.0))).abs() < 1e-9);
    }

    #[test]
    fn no_bars_are_a_picture_too() {
        let svg = Bars { title: "T".into(), unit: "us", bars: Vec::new() }.svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
